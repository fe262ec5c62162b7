/* The state of the page in the fragment of its address: what was asked, and how it is looked at.

   #run=visualbert/vqa&image=scene_2251&text=how+many+stars%3F&layer=layers.1&head=2

   What was asked has the names below; every other name belongs to the view (`state` of the linked view). */

const ASKED = ["run", "second", "image", "text", "choice", "no_word", "no_region", "box"];
/** In place of the id of a picture that the reader brought. */
export const OWN_PICTURE = "";

/** The fragment, without #. */
export function write({ run, second, images, text, choices, edit, view }) {
  const fragment = new URLSearchParams();
  fragment.append("run", run);
  if (second) fragment.append("second", second);
  for (const image of images) fragment.append("image", image);
  fragment.append("text", text);
  for (const choice of choices) fragment.append("choice", choice);
  for (const word of edit.words) fragment.append("no_word", word);
  for (const region of edit.regions) fragment.append("no_region", region);
  for (const box of edit.boxes) fragment.append("box", box.map(Math.round).join(","));
  for (const [name, value] of Object.entries(view)) {
    if (value !== null && value !== undefined && !ASKED.includes(name)) fragment.append(name, spell(value));
  }
  return fragment.toString();
}

/** What a fragment says; null if it names no run. */
export function read(text) {
  const fragment = new URLSearchParams(text.replace(/^#/, ""));
  if (!fragment.has("run")) return null;
  const view = {};
  for (const [name, value] of fragment) if (!ASKED.includes(name)) view[name] = unspell(value);
  return {
    run: fragment.get("run"),
    second: fragment.get("second") ?? "",
    images: fragment.getAll("image"),
    text: fragment.get("text") ?? "",
    choices: fragment.getAll("choice"),
    edit: {
      words: fragment.getAll("no_word").map(Number).filter(Number.isInteger),
      regions: fragment.getAll("no_region").map(Number).filter(Number.isInteger),
      boxes: fragment.getAll("box").map((box) => box.split(",").map(Number)).filter((box) => box.length === 4),
    },
    view,
  };
}

// Text is written as it is, unless it would be read as something else.
function spell(value) {
  return typeof value === "string" && unspell(value) === value ? value : JSON.stringify(value);
}

function unspell(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
