# docker build -f docker/cuda.Dockerfile -t wsss:cuda .
# docker run --rm --gpus all wsss:cuda                                    # make gpu-check
# docker run --rm --gpus all -v $PWD:/data wsss:cuda wsss export --model all --bundle /data/bundle --engine trt
# docker run --rm --gpus all wsss:cuda make demo
# With a driver that serves CUDA 12 and not 13: --build-arg TRT=trt-cu12
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ARG TRT=trt
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /wsss
COPY . .
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir -e ".[gpu,export,${TRT}]" pytest --extra-index-url https://pypi.nvidia.com \
    && touch .venv/.installed
ENV PATH=/wsss/.venv/bin:$PATH
CMD ["make", "gpu-check"]
