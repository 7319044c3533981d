"""Sets of the web: MMC4's shards, LAION's lines, img2dataset's tars and tables."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmi_deploy.errors import MmiError
from mmi_train.data.readers import shard_index, shards
from mmi_train.data.readers.image_text import caption_text
from mmi_train.data.readers.mmc4 import LoadedPicture, arranged
from mmi_train.data.readers.pictures import decoded
from mmi_train.data.readers.sample import Skipped
from train.data.readers.trees import checked, lines, opened, png, put, shown


def mmc4_document(*images: tuple[str, int, float], sentences: int = 3) -> dict[str, Any]:
    return {
        "url": "u",
        "text_list": [f"Sentence {number}." for number in range(sentences)],
        "image_info": [
            {"image_name": name, "matched_text_index": at, "matched_sim": alike}
            for name, at, alike in images
        ],
        "similarity_matrix": [],
    }


def zipped(content: str, *names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


def test_mmc4_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = mmc4_document(("a.png", 2, 0.3), ("b.png", 0, 0.24), ("c.png", 1, 0.2399))
    content = lines(
        good,
        mmc4_document(),
        mmc4_document(("a.png", 0, 0.1)),
        mmc4_document(("none.png", 0, 0.9), ("broken.png", 0, 0.9), ("a.png", 9, 0.9)),
    )
    tree = put(
        tmp_path,
        {
            "docs_shard_0_v2.jsonl.zip": zipped(content, "docs_shard_0_v2.jsonl"),
            "docs_no_face_shard_1_v3.jsonl": lines(good) + "{broken\n\n",
            "docs_shard_2_v2.jsonl.zip": zipped(content, "a.jsonl")[:80],
            "docs_shard_3_v2.jsonl.zip": zipped(content, "a.jsonl", "b.jsonl"),
            "images/a.png": 1,
            "b.png": 2,
            "images/broken.png": "not a picture",
        },
    )
    found = checked("mmc4", tree, capsys, "--show", "1")
    assert found["samples"] == 2
    assert found["skipped"] == {
        "shard is damaged": 2,
        "document has no picture": 3,
        "document is malformed": 1,
    }
    names = [part.get("image") for part in found["documents"][0]["parts"]]
    assert [name for name in names if name] == ["b.png", "images/a.png"]
    data = opened("mmc4", tree)
    assert shown(data.sample(0)) == shown(data.sample(0))
    orders = {str(shown(data.sample(0, epoch))) for epoch in range(30)}
    assert len(orders) == 4, "each of the two pictures before or after its sentence"


def grey(name: str) -> LoadedPicture:
    return LoadedPicture(name, decoded(png(), name))


def test_mmc4_keeps_six_pictures_in_the_order_of_the_sentences() -> None:
    images = mmc4_document(*((f"{n}", 8 - n, 0.5) for n in range(9)))["image_info"]
    kept: Counter[str] = Counter()
    for seed in range(60):
        parts = arranged([f"s{n}" for n in range(9)], images, grey, random.Random(seed))
        names = [part.picture.name for part in parts if hasattr(part, "picture")]
        assert len(names) == 6 and names == sorted(names, reverse=True)
        kept.update(names)
    assert set(kept) == {str(n) for n in range(9)} and max(kept.values()) < 60


def test_mmc4_drops_every_other_document_of_one_picture() -> None:
    images = mmc4_document(("a", 1, 0.5))["image_info"]

    def is_kept(seed: int) -> bool:
        try:
            arranged(["a", "b"], images, grey, random.Random(seed))
        except Skipped as reason:
            assert reason.reason == "document with one picture, dropped by chance"
            return False
        return True

    assert 80 < sum(map(is_kept, range(200))) < 120


def test_a_picture_that_begins_a_document_is_not_learned() -> None:
    images = mmc4_document(("a", 0, 0.5), ("b", 0, 0.5))["image_info"]
    parts = arranged(["One."], images, grey, random.Random(1), picture_first=1.0)
    assert [part.learn for part in parts] == [False, True, True]
    parts = arranged(["One.", "Two "], images, grey, random.Random(1), picture_first=0.0)
    assert [getattr(part, "text", None) for part in parts] == ["One.", None, None, "Two"]


def test_a_zip_bomb_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shards, "MOST_UNPACKED", 10_000)
    content = zipped("\n" * 10_001, "docs_shard_0_v2.jsonl")
    found = checked("mmc4", put(tmp_path, {"docs_shard_0_v2.jsonl.zip": content}), capsys)
    assert found["samples"] == 0 and found["skipped"] == {"shard is damaged": 1}


CAPTION = "A Blue lamp Floats."


def pairs(*entries: Any) -> str:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in entries)


@pytest.mark.parametrize("name", ["laion-coco", "laion-en", "cc12m", "objects365"])
def test_lines_of_captions(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = pairs(
        {"image": "0/a.jpg", "caption": CAPTION},
        "{'image': '0/a.jpg', 'caption': 'Single quotes here'}",
        {"image": "0/a.jpg", "caption": ["A list of", "Captions"]},
        {"image": "0/a.jpg", "caption": "too short"},
        {"image": "0/none.jpg", "caption": CAPTION},
        "__import__('os').mkdir('x')",
        {"image": "/etc/passwd", "caption": CAPTION},
    )
    tree = put(tmp_path, {"0000000.txt": content, "0/a.jpg": 1})
    found = checked(name, tree, capsys)
    assert found["samples"] == 3
    assert found["skipped"] == {
        "caption is shorter than 10 characters": 1,
        "picture is missing": 1,
        "line is malformed": 1,
        "picture lies outside": 1,
    }
    data = opened(name, tree)
    ways = {str(shown(data.sample(0, epoch))) for epoch in range(20)}
    text: Any = CAPTION.lower() if name.startswith("laion") else [CAPTION.lower()]
    assert ways == {
        str([text, ("0/a.jpg",)]),
        str(["<0/a.jpg>", [CAPTION.lower()]]),
    }


def test_captions_of_a_list_are_joined() -> None:
    assert caption_text(["A round Boat", "SECOND", 3]) == "a round boat second"


def tar(folder: Path, name: str, files: dict[str, Any]) -> None:
    with tarfile.open(folder / name, "w") as archive:
        for member, content in files.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("../evil.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def test_tars_of_img2dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, Any] = {
        "000000000.jpg": png(40),
        "000000000.txt": b"The old Caption",
        "000000000.json": {"key": "000000000", "status": "success", "caption": "x"},
        "000000001.json": {"key": "000000001", "status": "failed_to_download"},
        "000000002.jpg": png(50),
        "000000002.json": {"key": "000000002", "status": "success", "top_caption": "Top caption"},
        "000000003.jpg": png()[:30],
        "000000003.txt": b"A broken picture",
    }
    tar(tmp_path, "00000.tar", files)
    tar(tmp_path, "00002.tar", {"000000000.jpg": png()[:30], "000000000.txt": b"Same name, broken"})
    (tmp_path / "00001.tar").write_bytes(b"no tar")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = checked("laion-coco", tmp_path, capsys)
    assert found["samples"] == 2
    assert found["skipped"] == {"shard is damaged": 1, "download failed": 1, "picture is broken": 2}
    data = opened("laion-coco", tmp_path)
    first, second, *_ = data.samples()
    assert (first.id, second.id) == ("000000000", "000000002")
    assert {part.text for part in second.parts if hasattr(part, "text")} == {"top caption"}
    assert first.pictures[0].picture.load()[0, 0, 0] == 40


def test_tables_of_img2dataset(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"key": "000000000", "caption": CAPTION, "status": "success"},
        {"key": "000000001", "caption": CAPTION, "status": "failed_to_download"},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "00000.parquet")
    put(tmp_path, {"00000/000000000.jpg": 1})
    data = opened("cc12m", tmp_path)
    (sample,) = data.samples()
    assert sample.pictures[0].picture.name == "00000/000000000.jpg"
    assert data.skipped == {"download failed": 1}
    links = [{"URL": "http://x/y.jpg", "TEXT": CAPTION}]
    parquet.write_table(arrow.Table.from_pylist(links), tmp_path / "00000.parquet")
    with pytest.raises(MmiError, match="holds links, not pictures"):
        opened("laion-en", tmp_path)


def test_links_alone_are_explained(tmp_path: Path) -> None:
    tree = put(tmp_path, {"cc12m.tsv": "http://x/y.jpg\ta caption\n"})
    with pytest.raises(MmiError, match=r"holds links, not pictures.*img2dataset"):
        opened("cc12m", tree)
    with pytest.raises(MmiError, match=r"lacks \*.txt"):
        opened("laion-en", put(tmp_path / "empty", {"readme.md": "x"}))


@pytest.mark.parametrize("form", ["txt", "tar", "zip"])
def test_indexes_are_kept_until_a_shard_changes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MMI_CACHE", str(cache))
    monkeypatch.setattr(shard_index, "SMALLEST", 0)
    folder = put(tmp_path / "set", {"a.png": 1})
    name = "mmc4" if form == "zip" else "cc12m"

    def write(count: int) -> None:
        if form == "tar":
            pictures = {f"{n}.png": png(n) for n in range(count)}
            tar(folder, "0.tar", pictures | {f"{n}.txt": CAPTION.encode() for n in range(count)})
        elif form == "txt":
            put(folder, {"0.txt": lines(*[{"image": "a.png", "caption": CAPTION}] * count)})
        else:
            content = lines(*[mmc4_document(("a.png", 0, 0.5))] * count)
            put(folder, {"docs_shard_0_v2.jsonl.zip": zipped(content, "a.jsonl")})

    def parts() -> list[Any]:
        return [shown(one) for one in opened(name, folder).samples()]

    write(20)
    first = parts()
    (file,) = (cache / "data_index").iterdir()
    made = file.stat().st_mtime_ns
    assert parts() == first and file.stat().st_mtime_ns == made
    file.write_bytes(file.read_bytes()[:50])
    assert parts() == first, "a damaged index is made again"
    write(31)
    assert len(opened(name, folder)) == 31 and len(list(file.parent.iterdir())) == 2
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {"a.png", {"txt": "0.txt", "tar": "0.tar", "zip": "docs_shard_0_v2.jsonl.zip"}[form]}
    )
    monkeypatch.setenv("MMI_CACHE", "/proc/none")
    assert len(opened(name, folder)) == 31, "without a cache the index is made in memory"


def test_a_shard_that_changes_while_it_is_read_is_counted(tmp_path: Path) -> None:
    content = lines(*[mmc4_document(("a.png", 0, 0.5), ("b.png", 0, 0.5))] * 3)
    name = "docs_shard_0_v2.jsonl.zip"
    tree = put(tmp_path, {name: zipped(content, "a.jsonl"), "a.png": 1, "b.png": 2})
    data = opened("mmc4", tree)
    assert len(list(data.samples())) == 3
    (tree / name).write_bytes(zipped(content, "a.jsonl")[:60])
    with pytest.raises(Skipped, match="shard is damaged"):
        data.sample(0)
    (tree / name).unlink()
    with pytest.raises(Skipped, match="shard is damaged"):
        data.sample(0)
