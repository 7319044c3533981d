// Zip files: written without compression; read without or with deflate.

const CRC = new Uint32Array(256).map((_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

export function crc32(bytes) {
  let value = ~0;
  for (const byte of bytes) value = (value >>> 8) ^ CRC[(value ^ byte) & 255];
  return ~value >>> 0;
}

export class ZipError extends Error {}

// Names and offsets take UTF-8 (flag 0x800); the time is fixed, so that equal files are equal bytes.
const UTF8 = 0x800;
const DATE = (1 << 5) | 1; // 1 January 1980

// Blob of a zip with `files`, [name, bytes] each.
export function zip(files) {
  const pieces = [];
  const directory = [];
  let offset = 0;
  for (const [name, bytes] of files) {
    const path = new TextEncoder().encode(name);
    const common = [
      [2, 20], [2, UTF8], [2, 0], [2, 0], [2, DATE], [4, crc32(bytes)], [4, bytes.length],
      [4, bytes.length], [2, path.length], [2, 0],
    ];
    const local = record([4, 0x04034b50], ...common);
    directory.push(
      record([4, 0x02014b50], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]), path);
    pieces.push(local, path, bytes);
    offset += local.length + path.length + bytes.length;
  }
  const size = directory.reduce((sum, piece) => sum + piece.length, 0);
  const end = record(
    [4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, size], [4, offset],
    [2, 0]);
  return new Blob([...pieces, ...directory, end], { type: "application/zip" });
}

// Little-endian numbers, each [bytes, value].
function record(...fields) {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [size]) => sum + size, 0)));
  let at = 0;
  for (const [size, value] of fields) {
    if (size === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += size;
  }
  return new Uint8Array(view.buffer);
}

// Map of name -> bytes. Raises ZipError for anything damaged, and beyond `most` bytes in all.
export async function unzip(bytes, most = 2 ** 28) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const files = new Map();
  try {
    let end = bytes.length - 22;
    while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end -= 1;
    if (end < 0) throw new ZipError("the file is not a zip, or it is cut off");
    let at = view.getUint32(end + 16, true);
    let total = 0;
    for (let left = view.getUint16(end + 10, true); left > 0; left -= 1) {
      if (view.getUint32(at, true) !== 0x02014b50) throw new ZipError("the zip is damaged");
      const [flags, method] = [view.getUint16(at + 8, true), view.getUint16(at + 10, true)];
      const [crc, packed, size] = [16, 20, 24].map((from) => view.getUint32(at + from, true));
      const [name, extra, comment] = [28, 30, 32].map((from) => view.getUint16(at + from, true));
      const start = view.getUint32(at + 42, true);
      const path = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + name));
      at += 46 + name + extra + comment;
      if (path.endsWith("/")) continue;
      total += size;
      if (total > most) throw new ZipError("the zip holds too much for one document");
      if (flags & 1) throw new ZipError("the zip is locked with a password");
      const data = start + 30 + view.getUint16(start + 26, true) + view.getUint16(start + 28, true);
      const content = await unpack(bytes.slice(data, data + packed), method, size);
      if (content.length !== size || crc32(content) !== crc) {
        throw new ZipError(`${path} in the zip is damaged`);
      }
      files.set(path, content);
    }
  } catch (error) {
    if (error instanceof RangeError) throw new ZipError("the zip is damaged");
    throw error;
  }
  return files;
}

async function unpack(packed, method, size) {
  if (method === 0) return packed;
  if (method !== 8) throw new ZipError("the zip is packed in a way that browsers cannot read");
  const reader = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"))
    .getReader();
  const content = new Uint8Array(size);
  let at = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return content.subarray(0, at);
      if (at + value.length > size) throw new ZipError("the zip is damaged");
      content.set(value, at);
      at += value.length;
    }
  } catch {
    throw new ZipError("the zip is damaged");
  }
}
