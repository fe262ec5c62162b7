/* What the reader took away from a question, or drew into its pictures.

   An edit is {words: [[row, number]], regions: [[row, number]], boxes: [{image, box}]}. Its numbers are those of the
   document of the first model for the unchanged question; here they are found in the documents of changed questions and
   of other models. */

export const NO_EDIT = { words: [], regions: [], boxes: [] };

const SAME_BOX = 0.5; // share of two boxes that is common to both, from which they are one

export const isEmpty = ({ words, regions, boxes }) => !words.length && !regions.length && !boxes.length;

/** The fields of a request that ask for an edit. */
export const toRequest = ({ words, regions, boxes }) => ({
  without_words: words,
  without_regions: regions,
  boxes: boxes.map(({ image, box }) => ({ image, box })),
});

/** An edit in the numbers of another model's document for the unchanged question, without what that does not show. */
export function translate(edit, from, to) {
  if (from === to) return edit;
  return {
    words: matchAll(edit.words, (row, number) => matchWord(from.rows[row].words, number, to.rows[row]?.words ?? [])),
    regions: matchAll(edit.regions, (row, number) =>
      matchRegion(from.rows[row].regions[number], to.rows[row]?.regions ?? []),
    ),
    boxes: edit.boxes,
  };
}

/** An edit, and what the reader has now taken away from the document that shows it or drawn there.
    @param change as `onEdit` of the linked view reports it.
    @param shown documents of the changed question, one for each model.
    @param base documents of the unchanged one. */
export function extend(edit, change, shown, base) {
  const place = change.document;
  const own = translate(edit, base[0], base[place]);
  const { row } = change;
  const [now, first] = [shown[place].rows[row], base[place].rows[row]];
  const words = change.without_words.map((number) => [row, findWord(now.words, number, first.words, own.words, row)]);
  const regions = [];
  let boxes = [...edit.boxes];
  for (const number of change.without_regions) {
    const region = now.regions[number];
    const known = first.regions.findIndex((other) => sameBox(region, other));
    if (known >= 0) regions.push([row, known]);
    else boxes = boxes.filter((drawn) => drawn.image !== region.image || overlap(drawn.box, region.box) < SAME_BOX);
  }
  for (const [x1, y1, x2, y2, image] of change.boxes) boxes.push({ image, box: [x1, y1, x2, y2].map(round) });
  const added = translate({ words, regions, boxes: [] }, base[place], base[0]);
  return { words: join(edit.words, added.words), regions: join(edit.regions, added.regions), boxes };
}

/** The parts of an edit: {name, rest: the edit without that part}. */
export function listParts(edit, base) {
  const without = (kind, part) => ({ ...edit, [kind]: edit[kind].filter((other) => other !== part) });
  const part = (kind, name) => (one) => ({ name: name(one), rest: without(kind, one) });
  return [
    ...edit.words.map(part("words", ([row, number]) => `without “${base.rows[row].words[number].text}”`)),
    ...edit.regions.map(part("regions", ([row, number]) => `without ${base.rows[row].regions[number].name}`)),
    ...edit.boxes.map(part("boxes", () => "with a drawn box")),
  ];
}

const round = (corner) => Math.round(corner * 10) / 10;

function join(places, added) {
  const known = new Set(places.map(String));
  return [...places, ...added.filter((place) => !known.has(String(place)))];
}

function matchAll(places, match) {
  return places.map(([row, number]) => [row, match(row, number)]).filter(([, number]) => number >= 0);
}

// The word of another list with the same text and as many of that text before it.
function matchWord(words, number, others) {
  const { text } = words[number];
  const before = words.slice(0, number).filter((word) => word.text === text).length;
  return others.flatMap((word, at) => (word.text === text ? [at] : []))[before] ?? -1;
}

function matchRegion(region, others) {
  let [best, most] = [-1, SAME_BOX];
  others.forEach((other, at) => {
    if (other.image !== region.image || other.special !== region.special || !other.box || !region.box) return;
    const share = overlap(region.box, other.box);
    if (share > most) [best, most] = [at, share];
  });
  return best;
}

// A word of a changed text in the unchanged one: words keep their order, and those that are gone are known.
function findWord(words, number, originals, gone, row) {
  const missing = new Set(gone.filter(([own]) => own === row).map(([, at]) => at));
  let at = -1;
  for (let k = 0; k <= number; k++) {
    do at += 1;
    while (at < originals.length - 1 && (missing.has(at) || originals[at].text !== words[k].text));
  }
  return at;
}

const sameBox = (one, other) =>
  one.image === other.image && one.special === other.special && String(one.box) === String(other.box);

// Common share of two boxes.
function overlap(a, b) {
  const width = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]));
  const height = Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const area = ([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);
  return (width * height) / (area(a) + area(b) - width * height || 1);
}
