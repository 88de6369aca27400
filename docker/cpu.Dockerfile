# docker build -f docker/cpu.Dockerfile -t wsss .
# docker run --rm wsss                                                   # make demo
# docker run --rm -v $PWD:/data wsss wsss label /data/photos --classes voc --bundle /data/bundle --out /data/store
# docker run --rm wsss make test
FROM python:3.12-slim

RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /wsss
COPY . .
RUN make build/demo-venv/.installed
ENV PATH=/wsss/build/demo-venv/bin:$PATH
CMD ["make", "demo"]
