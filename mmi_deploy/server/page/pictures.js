// Picture files: check, scale down what is too large, and convert.

// Formats that are sent as they are; others are converted to PNG.
const AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];

export class PictureError extends Error {}

export function megabytes(bytes) {
  return bytes < 100_000 ? `${Math.ceil(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// {blob, width, height, note} of a file; `note` says that it was scaled down. Raises PictureError.
export async function readPicture(file, limits) {
  const name = file.name || "the picture";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new PictureError(`${name} cannot be read as a picture.`);
  }
  const { width, height } = bitmap;
  const fits = file.size <= limits.bytes && width * height <= limits.pixels;
  if (fits && AS_THEY_ARE.includes(file.type)) {
    bitmap.close();
    return { blob: new Blob([file], { type: file.type }), width, height, note: "" };
  }
  let scale = Math.min(1, Math.sqrt(limits.pixels / (width * height)));
  let type = fits || file.type === "image/png" ? "image/png" : "image/jpeg";
  for (let tries = 0; tries < 8; tries += 1) {
    const [w, h] = [width, height].map((side) => Math.max(1, Math.floor(side * scale)));
    const blob = await encode(bitmap, w, h, type);
    if (blob && blob.size <= limits.bytes) {
      bitmap.close();
      const scaled = `${name} (${width} × ${height}, ${megabytes(file.size)}) is larger than the ` +
        `server takes and was scaled down to ${w} × ${h}, ${megabytes(blob.size)}.`;
      return { blob, width: w, height: h, note: w < width || !fits ? scaled : "" };
    }
    if (type === "image/png") type = "image/jpeg";
    else scale *= 0.7;
  }
  bitmap.close();
  throw new PictureError(
    `${name} is too large for this server (at most ${megabytes(limits.bytes)}).`);
}

async function encode(bitmap, width, height, type) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // the server shows transparent parts on white
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return new Promise((done) => canvas.toBlob(done, type, 0.9));
}

export async function sizeOf(blob) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  bitmap.close();
  return { width, height };
}

export function fromBase64(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type });
}

export async function toBase64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let binary = "";
  for (let at = 0; at < bytes.length; at += 0x8000) {
    binary += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  }
  return btoa(binary);
}

// One frame of muted noise, for a picture of which nothing is known yet.
export function noise(canvas) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const bytes = crypto.getRandomValues(new Uint8Array(canvas.width * canvas.height * 3));
  for (let at = 0, from = 0; at < image.data.length; at += 4) {
    const grey = bytes[from++];
    image.data[at] = (grey * 2 + bytes[from++]) / 3;
    image.data[at + 1] = grey;
    image.data[at + 2] = (grey * 2 + bytes[from++]) / 3;
    image.data[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
