/* What the page itself shows of answers: a change of them, and a ranking of pictures. The linked view of picture, words
   and answers is inspect.js. */

import { decimal, make, percent, points } from "./dom.js";
import { exampleAddress } from "./server.js";

const MOST_ANSWERS = 6; // in a comparison of two answers
const HINT = "Best first, each with the model's score. Choose a picture to look inside.";
const FIRST_PLACES = 12; // of a ranking, before the rest is asked for

/** The answers of two documents of one model next to each other.
    @param title which model, if several are shown. */
export function drawDifference(before, after, title) {
  const rows = joinAnswers(before.answers, after.answers);
  const head = make(
    "tr",
    {},
    make("th", { scope: "col" }, "Answer"),
    make("th", { scope: "col" }, "Before"),
    make("th", { scope: "col" }, "Now"),
    make("th", { scope: "col", class: "number" }, "Change"),
  );
  const body = rows.map(({ text, was, is }) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, text),
      make("td", {}, drawBar(was, "was")),
      make("td", {}, drawBar(is, "is")),
      make(
        "td",
        { class: `number ${is === null || was === null ? "" : is > was ? "more" : is < was ? "less" : ""}` },
        is === null || was === null ? "–" : points(is - was),
      ),
    ),
  );
  return make(
    "table",
    { class: "change" },
    make("caption", {}, title),
    make("thead", {}, head),
    make("tbody", {}, ...body),
  );
}

function drawBar(share, kind) {
  if (share === null) return make("span", { class: "not-listed" }, "not listed");
  const bar = make("span", { class: `bar ${kind}`, "aria-hidden": "true" }, make("span"));
  bar.firstChild.style.width = `${(share * 100).toFixed(1)}%`;
  return make("span", { class: "with-bar" }, bar, make("span", { class: "number" }, percent(share)));
}

// The answers of both, those that are probable now first, then those that were; a share is null where it is not listed.
function joinAnswers(before, after) {
  const key = (answer) => JSON.stringify([answer.text, answer.box]);
  const old = new Map(before.map((answer) => [key(answer), answer]));
  const now = new Map(after.map((answer) => [key(answer), answer]));
  const found = [...now.entries()].map(([name, answer]) => ({
    text: answer.text,
    was: old.get(name)?.probability ?? null,
    is: answer.probability,
  }));
  for (const [name, answer] of old) {
    if (!now.has(name)) found.push({ text: answer.text, was: answer.probability, is: null });
  }
  return found.sort((a, b) => Math.max(b.is ?? 0, b.was ?? 0) - Math.max(a.is ?? 0, a.was ?? 0)).slice(0, MOST_ANSWERS);
}

/** Pictures at hand in the order in which a caption fits them.
    @param ranking [{id, score}], best first.
    @param names id -> name.
    @param looked id of the picture that is looked into, or null.
    @param onPick called with the id of a picture that the reader wants to look into. */
export function drawRanking(ranking, names, title, looked, onPick) {
  const list = make("ol", { class: "ranking" });
  const put = (from, to) =>
    list.append(
      ...ranking.slice(from, to).map(({ id, score }, place) => {
        const rank = from + place + 1;
        const name = names.get(id) ?? id;
        const image = make("img", { src: exampleAddress(id, 320), alt: "", loading: "lazy" });
        const pick = make(
          "button",
          {
            type: "button",
            "aria-pressed": String(id === looked),
            "aria-label": `Place ${rank}: ${name}, score ${decimal(score)}. Look inside.`,
          },
          image,
          make("span", { class: "rank" }, String(rank)),
          make("span", { class: "score number" }, decimal(score)),
        );
        pick.addEventListener("click", () => onPick(id));
        return make("li", {}, pick);
      }),
    );
  put(0, FIRST_PLACES);
  const section = make("section", {}, title ? make("h2", {}, title) : null, make("p", { class: "hint" }, HINT), list);
  if (ranking.length > FIRST_PLACES) {
    const rest = make("button", { type: "button", class: "quiet" }, `Show all ${ranking.length}`);
    rest.addEventListener("click", () => {
      put(FIRST_PLACES, ranking.length);
      rest.remove();
      list.children[FIRST_PLACES].querySelector("button").focus();
    });
    section.append(rest);
  }
  return section;
}
