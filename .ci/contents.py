"""Check what the wheel and the source distribution in a folder hold: all modules of the package, and nothing else."""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def expected_modules() -> set[str]:
    """Every file that the wheel must hold, by the packages that pyproject.toml lists."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    files = {"wsss/py.typed"}
    for package in settings["packages"]:
        parts = package.split(".")
        folder = ROOT.joinpath(*(parts if len(parts) == 1 or (ROOT / "wsss" / parts[1]).is_dir() else parts[1:]))
        files |= {"/".join([*parts, path.name]) for path in folder.glob("*.py")}
        for pattern in settings["package-data"].get(package, []):
            files |= {"/".join([*parts, path.relative_to(folder).as_posix()]) for path in folder.glob(pattern)}
    return files


def main() -> None:
    """Exit with a message where the contents differ."""
    folder = Path(sys.argv[1])
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if held != (wanted := expected_modules()):
        raise SystemExit(f"{wheel}: missing {sorted(wanted - held)[:5]}, surplus {sorted(held - wanted)[:5]}")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "wsss/__init__.py", "mini/bundle/sam/manifest.json"):
        if needed not in names:
            raise SystemExit(f"{source}: {needed} is missing")
    print(f"{wheel.name}: {len(held)} files, as listed; {source.name}: {len(names)} files")


if __name__ == "__main__":
    main()
