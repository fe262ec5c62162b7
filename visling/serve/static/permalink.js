/* The state of the page in the fragment of its address: what was asked, and how it is looked at.

   #run=visualbert/vqa&image=scene_2251&text=how+many+stars%3F&direction=text_to_regions&cells=1.2

   The names below are those of what was asked; the others belong to the linked view (inspect.js). */

/** In place of the id of a picture that the reader brought. */
export const OWN_PICTURE = "";

/** The fragment, without #. */
export function write({ run, second, images, text, choices, edit, view }) {
  const fragment = new URLSearchParams({ run });
  const add = (name, values) => values.forEach((value) => fragment.append(name, value));
  if (second) fragment.append("second", second);
  add("image", images);
  fragment.append("text", text);
  add("choice", choices);
  add("no_word", edit.words.map((place) => place.join(".")));
  add("no_region", edit.regions.map((place) => place.join(".")));
  add("box", edit.boxes.map(({ image, box }) => [image, ...box].join(",")));
  const looked = window.visling.stateToFragment(view);
  return looked ? `${fragment}&${looked}` : String(fragment);
}

/** What a fragment says; null if it names no run. */
export function read(text) {
  const fragment = new URLSearchParams(text.replace(/^#/, ""));
  if (!fragment.has("run")) return null;
  const numbers = (name, by, count) =>
    fragment
      .getAll(name)
      .map((part) => part.split(by).map(Number))
      .filter((part) => part.length === count && part.every(Number.isFinite));
  return {
    run: fragment.get("run"),
    second: fragment.get("second") ?? "",
    images: fragment.getAll("image"),
    text: fragment.get("text") ?? "",
    choices: fragment.getAll("choice"),
    edit: {
      words: numbers("no_word", ".", 2),
      regions: numbers("no_region", ".", 2),
      boxes: numbers("box", ",", 5).map(([image, ...box]) => ({ image, box })),
    },
    view: window.visling.fragmentToState(text),
  };
}
