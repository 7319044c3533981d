"""Modules of the page that need no page: streams, zips, Markdown, the document, the request."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploy.server.page.mock_server import MockServer, drawn, png
from mmi_deploy.documents.document import Draw, Image, Text, document_of
from mmi_deploy.documents.files import read_document, to_markdown

if TYPE_CHECKING:
    from playwright.sync_api import Page

STREAM = (
    b"\xef\xbb\xbf: a comment\r\n\r\n"
    b'event: response.created\r\ndata: {"a":\r\ndata: 1}\r\n\r\n'
    b"id: 7\nretry: 3000\n: keep-alive\n\n"
    + 'data:{"text": "déjà 🎨"}\n\n'.encode()
    + b"data\r\rdata: last\r\revent: only\n\ndata: [DONE]\n\n"
    b"data: never ended"
)
EVENTS = [
    ["response.created", '{"a":\n1}'],
    ["", '{"text": "déjà 🎨"}'],
    ["", ""],
    ["", "last"],
    ["", "[DONE]"],
]

# Reads `pieces` and returns its events.
READ = """async (pieces) => {
  const { EventReader } = await import("/page/stream.js");
  return pieces.map((split) => {
    const reader = new EventReader();
    return split.flatMap((bytes) => reader.push(new Uint8Array(bytes)))
      .map(({ name, data }) => [name, data]);
  });
}"""


def test_events_come_out_of_bytes_split_anywhere(page: Page) -> None:
    splits = [[list(STREAM[:at]), list(STREAM[at:])] for at in range(len(STREAM) + 1)]
    splits.append([[byte] for byte in STREAM])
    for events in page.evaluate(READ, splits):
        assert events == EVENTS


def test_a_stream_of_the_api_is_read_as_its_events(page: Page, server: MockServer) -> None:
    """With the chunks of a real connection."""
    body = {
        "input": [{"content": []}],
        "tools": [{"partial_images": 2}],
        "mmi": {"seed": 1, "max_images": 1},
    }
    kinds = page.evaluate(
        """async (body) => {
          const { respond } = await import("/page/server.js");
          const kinds = [];
          for await (const event of respond(body, { requestId: "a", onSign: () => {} })) {
            kinds.push(event.type);
          }
          return kinds;
        }""",
        body,
    )
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.image_generation_call.partial_image") == 2


def in_zip(page: Page, files: dict[str, bytes]) -> bytes:
    found = page.evaluate(
        """async (files) => {
          const { zip } = await import("/page/zip.js");
          const blob = zip(files.map(([name, bytes]) => [name, new Uint8Array(bytes)]));
          return [...new Uint8Array(await blob.arrayBuffer())];
        }""",
        [[name, list(data)] for name, data in files.items()],
    )
    return bytes(found)


def out_of_zip(page: Page, data: bytes) -> Any:
    return page.evaluate(
        """async (bytes) => {
          const { unzip } = await import("/page/zip.js");
          try {
            const files = await unzip(new Uint8Array(bytes), 1e6);
            return [...files].map(([name, content]) => [name, [...content]]);
          } catch (error) { return `${error.constructor.name}: ${error.message}`; }
        }""",
        list(data),
    )


FILES = {"story.md": "Grüße 🎨\n".encode(), "bild ä.png": png(drawn(1)), "empty": b""}


def test_python_reads_the_zips_that_are_written(page: Page) -> None:
    with zipfile.ZipFile(io.BytesIO(in_zip(page, FILES))) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == FILES


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_of_other_programs_are_read(page: Page, method: int) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.comment = b"a comment after the end"
        archive.writestr("folder/", b"")
        for name, data in FILES.items():
            archive.writestr(name, data)
    assert {name: bytes(data) for name, data in out_of_zip(page, file.getvalue())} == FILES


def test_damaged_zips_are_refused(page: Page) -> None:
    whole = in_zip(page, FILES)
    for cut in (0, 10, 21, 22, len(whole) // 2, len(whole) - 1):
        assert str(out_of_zip(page, whole[:cut])).startswith("ZipError"), cut
    wrong = bytearray(whole)
    wrong[whole.index(b"\x89PNG") + 20] ^= 1
    assert "is damaged" in out_of_zip(page, bytes(wrong))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("story.md", bytes(2_000_000))  # beyond the limit that the test gives
    assert "too much" in out_of_zip(page, file.getvalue())


# Entries of the Markdown reader, as the parts of mmi_deploy.
def entries(page: Page, source: str) -> list[Any]:
    found: list[Any] = page.evaluate(
        """async (source) => (await import("/page/markdown.js")).fromMarkdown(source)""", source
    )
    return found


def expected(parts: tuple[Any, ...]) -> list[Any]:
    def one(part: Any) -> Any:
        if isinstance(part, Text):
            return {"text": part.text}
        if isinstance(part, Draw):
            return {"draw": True}
        return {"target": Path(part.source).name, "alt": part.alt}

    return [one(part) for part in parts]


SOURCES = [
    "![a red square](a.png)\n\nthe red square moves down.\n\n![]()\n",
    "text ![x](<a.png>) more ![](a.png 'title')![draw]() end",
    "![a \\[b\\] c][ref]\n\nwords\n\n[ref]: a.png\n",
    "a literal \\![ and \\<img src=x> and ![]()",
    "`![x](a.png)` is code, ![x](a.png) is none",
    "```\n![x](a.png)\n```\n\n![](a.png)",
    "\\```\n\n![](a.png)\n\nafter",
    "a # heading\r\n\r\n![](a%2Epng)\r\n",
    "~~~\n```\n~~~\n\n![]()",
    "\\\\![](a.png) two backslashes",
    "  \n\n  ",
]


@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_markdown_is_read_as_python_reads_it(page: Page, tmp_path: Path, source: str) -> None:
    (tmp_path / "a.png").write_bytes(png(drawn(0)))
    (tmp_path / "story.md").write_bytes(source.encode())
    assert entries(page, source) == expected(read_document(tmp_path / "story.md").parts)


TEXTS = [
    "words",
    "a ![ that is no picture ![x](a.png)",
    "<img src=x>",
    "```\nopen code",
    "  <!-- open",
    "<script>alert(1)</script>",
    "\\```",
    "\\\\![",
    "> quote\n\n    code ![]()\n\n* list",
    "line\nline\n\nparagraph 🎨",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_markdown_that_is_written_is_read_as_the_same(
    page: Page, tmp_path: Path, text: str
) -> None:
    """By Python and by the page; what Python writes, too."""
    (tmp_path / "picture-01.png").write_bytes(png(drawn(0)))
    alt = "an [alt] `text` with \\ and <b>"
    source = page.evaluate(
        """async ([words, alt]) => {
          const { toMarkdown } = await import("/page/markdown.js");
          const { text, picture, draw, pictureNames } = await import("/page/document.js");
          const parts = [text(words), picture(new Blob([], {type: "image/png"}), 1, 1, { alt }),
            draw(), text(words)];
          return toMarkdown(parts, pictureNames(parts));
        }""",
        [text, alt],
    )
    (tmp_path / "story.md").write_text(source, encoding="utf-8")
    image = Image(tmp_path / "picture-01.png", alt)
    document = document_of(Text(text), image, Draw(), Text(text))
    assert read_document(tmp_path / "story.md") == document
    assert entries(page, source) == expected(document.parts)
    theirs = to_markdown(document.parts, lambda picture: "picture-01.png")
    assert entries(page, theirs) == expected(document.parts)


def test_neighbouring_texts_are_joined_for_the_model(page: Page) -> None:
    """A text is continued by the model, and the writer begins a new paragraph."""
    joined = page.evaluate(
        """async () => {
          const { text, draw, blocks } = await import("/page/document.js");
          const model = (words, lead) => text(words, { by: "model", lead });
          return blocks([text("one"), model("two", " "), model("three", ""), text("four"),
            text("  "), text("\\nfive"), draw(), model("six", " ")]).map((b) => b.text ?? b.kind);
        }"""
    )
    assert joined == ["one twothree\n\nfour\nfive", "draw", "six"]


def test_texts_are_cut_at_the_caret_of_a_pasted_picture(page: Page) -> None:
    cut = """async (caret) => {
      const { text, draw, insertAt } = await import("/page/document.js");
      const parts = [text("one two")];
      insertAt(parts, parts[0].id, caret, draw());
      return parts.map((part) => part.text ?? part.kind);
    }"""
    assert page.evaluate(cut, 0) == ["draw", "one two"]
    assert page.evaluate(cut, 3) == ["one", "draw", "two"]
    assert page.evaluate(cut, 7) == ["one two", "draw"]


HOSTILE = "a \"quote\" 'n' $HOME `id` \\ \\n $(id)\nEND-OF-JSON\n</script> déjà 🎨 \u2028"

# A document with pictures of two kinds, and its request.
SHOWN = """async ([words, origin]) => {
  const { text, picture, draw, pictureNames } = await import("/page/document.js");
  const { curl, python, requestBody } = await import("/page/request.js");
  const canvas = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
  const blob = (type) => new Promise((done) => canvas.toBlob(done, type));
  const parts = [text(words), picture(await blob("image/png"), 8, 8), draw(),
    picture(await blob("image/jpeg"), 8, 8), text("end")];
  const options = { seed: 7, images: 2, tokens: 64, guidance: 3.5, sampler: "ddim:50", fullEvery: 3,
    temperature: 0.5, topP: 0.9, previews: 3 };
  const files = [];
  for (const [part, name] of pictureNames(parts)) {
    files.push([name, [...new Uint8Array(await part.blob.arrayBuffer())]]);
  }
  const about = [origin, "tiny", parts, options, false];
  return { body: await requestBody("tiny", parts, options), curl: curl(...about),
    python: python(...about), files };
}"""


@pytest.mark.parametrize("program", ["curl", "python"])
def test_the_request_shown_is_the_request_sent(
    page: Page, server: MockServer, tmp_path: Path, program: str
) -> None:
    """Run as it is shown, beside the pictures of the zip."""
    shown = page.evaluate(SHOWN, [HOSTILE, server.url])
    for name, data in shown["files"]:
        (tmp_path / name).write_bytes(bytes(data))
    (tmp_path / "script").write_text(shown[program], encoding="utf-8")
    interpreter = "bash" if program == "curl" else sys.executable
    ran = subprocess.run(
        [interpreter, "script"],
        cwd=tmp_path,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert server.bodies == [shown["body"]]
    said = ran.stdout.decode()
    assert "response.completed" in said if program == "curl" else "/v1/mmi/images/" in said
    content = shown["body"]["input"][0]["content"]
    kinds = ["input_text", "input_image", "mmi.draw", "input_image", "input_text"]
    assert [part["type"] for part in content] == kinds
    assert content[0]["text"] == HOSTILE
    assert json.dumps(content[3]).count("data:image/jpeg;base64,") == 1
