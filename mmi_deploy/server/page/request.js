// The request to /v1/responses, and the same request as curl and as Python.

import { blocks, pictureNames } from "./document.js";
import { toBase64 } from "./pictures.js";

// Body of the request. `picture` makes the content of a picture part.
function bodyOf(model, parts, options, picture) {
  const content = blocks(parts).map((block) => {
    if (block.kind === "text") return { type: "input_text", text: block.text };
    return block.kind === "draw" ? { type: "mmi.draw" } : picture(block);
  });
  const mmi = { seed: options.seed, max_images: options.images, guidance: options.guidance };
  if (options.sampler) mmi.schedule = options.sampler;
  if (options.fullEvery > 1) mmi.full_every = options.fullEvery;
  mmi.image_transport = "url";
  return {
    model,
    stream: true,
    store: false,
    max_output_tokens: options.tokens,
    temperature: options.temperature,
    top_p: options.topP,
    input: [{ role: "user", content }],
    tools: [{ type: "image_generation", partial_images: options.previews, output_format: "png" }],
    mmi,
  };
}

export async function requestBody(model, parts, options) {
  const pictures = parts.filter((part) => part.kind === "picture");
  const data = new Map();
  for (const part of pictures) {
    data.set(part, `data:${part.blob.type};base64,${await toBase64(part.blob)}`);
  }
  return bodyOf(model, parts, options, (part) => (
    { type: "input_image", image_url: data.get(part), detail: "auto" }));
}

// The request as a shell command; pictures are read from the files of "Save all".
export function curl(origin, model, parts, options, withKey) {
  const names = pictureNames(parts);
  const files = [];
  const body = bodyOf(model, parts, options, (part) => {
    files.push(part);
    return { type: "input_image", image_url: `\u0001${files.length - 1}\u0001`, detail: "auto" };
  });
  const json = JSON.stringify(body, null, 1)
    .replace(/[\\$`]/g, "\\$&") // the shell reads these in a here-document
    .replace(/"image_url": "\\\\u0001(\d+)\\\\u0001"/g, (_, index) => {
      const part = files[Number(index)];
      const data = `$(base64 < ${names.get(part)} | tr -d '\\n')`;
      return `"image_url": "data:${part.blob.type};base64,${data}"`;
    });
  const key = withKey ? ' \\\n  -H "Authorization: Bearer $MMI_KEY"' : "";
  return `curl -N ${origin}/v1/responses -H 'Content-Type: application/json'${key} \\\n` +
    `  --data-binary @- <<END-OF-JSON\n${json}\nEND-OF-JSON\n`;
}

// The request with the openai client, which writes the answer and its pictures.
export function python(origin, model, parts, options, withKey) {
  const names = pictureNames(parts);
  const { mmi, ...body } = bodyOf(model, parts, options, (part) => ({ file: names.get(part) }));
  const items = body.input[0].content.map((item) => (
    item.file ? `picture(${literal(item.file)}),` : `${literal(item)},`));
  const key = withKey ? 'os.environ["MMI_KEY"]' : '"none"';
  const encode = `
def picture(name):
    data = base64.b64encode(Path(name).read_bytes()).decode()
    kind = {"jpg": "jpeg"}.get(name.rsplit(".")[-1], name.rsplit(".")[-1])
    return {"type": "input_image", "image_url": f"data:image/{kind};base64,{data}", "detail": "auto"}

`;
  const imports = [names.size && "import base64", withKey && "import os",
    names.size && "from pathlib import Path"].filter(Boolean);
  return `${imports.map((line) => `${line}\n`).join("")}${imports.length ? "\n" : ""}` +
    `from openai import OpenAI
${names.size ? encode : ""}
client = OpenAI(base_url=${literal(`${origin}/v1`)}, api_key=${key})
stream = client.responses.create(
    model=${literal(model)},
    stream=True,
    store=False,
    max_output_tokens=${options.tokens},
    temperature=${options.temperature},
    top_p=${options.topP},
    input=[{"role": "user", "content": [
${items.map((item) => `        ${item}`).join("\n")}
    ]}],
    tools=${literal(body.tools)},
    extra_body={"mmi": ${literal(mmi)}},
)
for event in stream:
    if event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)
    elif event.type == "response.output_item.done" and event.item.type == "image_generation_call":
        print("\\n[picture]", event.item.model_dump()["mmi"]["url"])
`;
}

// JSON as a Python literal; the only words in it are strings, numbers and lists of these.
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value && typeof value === "object") {
    return `{${Object.entries(value).map(([k, v]) => `${literal(k)}: ${literal(v)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
