"""Tiny carrier packages in a folder that pip finds, and a models folder of the test's own."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmill.sources import CatalogueModel
from tokenmill.sources.catalogue import CarrierPackages


class CarrierShelf:
    """A folder of wheels that serves as pip's only source of packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, data: bytes, version: str = "1.0", member: str = "data/part.bin") -> Path:
        module = name.replace("-", "_")
        wheel = self.folder / f"{module}-{version}-py3-none-any.whl"
        info = f"{module}-{version}.dist-info"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{module}/{member}", data)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return wheel

    def remove(self, name: str) -> None:
        for wheel in self.folder.glob(f"{name.replace('-', '_')}-*.whl"):
            wheel.unlink()

    def put_parts(self, parts: list[bytes]) -> None:
        for index, part in enumerate(parts, start=1):
            self.put(f"tiny-part{index}", part)


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    monkeypatch.setenv("TOKENMILL_MODELS", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CarrierShelf:
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return CarrierShelf(folder)


@pytest.fixture
def tiny_model() -> Callable[..., CatalogueModel]:
    """A catalogue entry for the joined bytes of the parts tiny-part1, tiny-part2, ..."""

    def make(parts: list[bytes], sha256: str | None = None) -> CatalogueModel:
        whole = b"".join(parts)
        requirements = tuple(f"tiny-part{index}==1.0" for index in range(1, len(parts) + 1))
        return CatalogueModel(
            "tiny",
            "Tiny",
            "Apache-2.0",
            "",
            size=len(whole),
            sha256=sha256 or hashlib.sha256(whole).hexdigest(),
            sources=(CarrierPackages(requirements, "*/data/part.bin"),),
        )

    return make
