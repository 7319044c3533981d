// Documents to begin with.

import { draw, picture, text } from "./document.js";
import { sizeOf } from "./pictures.js";

const SCENE = "a red square at top center and a blue cross at bottom right on white";

async function scene() {
  const blob = await (await fetch("/page/scene.png")).blob();
  const { width, height } = await sizeOf(blob);
  return picture(blob, width, height, { alt: SCENE });
}

// {parts, draft, images} of an example; images: pictures at most beyond those asked for.
export async function example(name) {
  if (name === "draw") return { parts: [text(`draw: ${SCENE}.`), draw()], draft: "", images: 0 };
  if (name === "question") return { parts: [await scene()], draft: "what colour is the cross?", images: 0 };
  return { parts: [await scene()], draft: "the red square moves down.", images: 4 };
}
