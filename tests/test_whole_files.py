"""Folders of models that are replaced whole, and what stays readable while they are."""

from pathlib import Path

import pytest

from tokcom_hf.whole_files import whole_folder


def write(folder: Path, text: str) -> None:
    for part in ("", "image_decoder"):
        (folder / part).mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            # The decoder is another stage's: this one writes it as it was.
            (folder / part / name).write_text(f"{name} {text if not part else 'of an earlier stage'}")


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def save(folder: Path, text: str) -> None:
    with whole_folder(folder) as unfinished:
        write(unfinished, text)


@pytest.mark.parametrize("stop", range(1, 4))
def test_a_part_that_does_not_change_is_readable_whenever_the_save_stops(tmp_path, monkeypatch, stop):
    save(tmp_path, "first")
    renames, rename = [], Path.replace

    def at_last(self, target):
        renames.append(target)
        if len(renames) == stop:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", at_last)
    if stop < 3:
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, "second")
        # Neither model: nothing loads weights of one with the configuration of the other.
        assert not (tmp_path / "config.json").exists()
    else:
        save(tmp_path, "second")
        assert len(renames) == 2
    decoder = {name: text for name, text in content(tmp_path).items() if name.startswith("image_decoder")}
    assert decoder == {
        f"image_decoder/{name}": f"{name} of an earlier stage" for name in ("config.json", "model.safetensors")
    }
    monkeypatch.setattr(Path, "replace", rename)
    save(tmp_path, "second")
    assert content(tmp_path)["config.json"] == "config.json second" and len(content(tmp_path)) == 4
