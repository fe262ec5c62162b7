/* The page of `visling serve`: what is asked, of which models, and where the answers go.

   index.html   the frame              permalink.js  the state in the address
   pictures.js  choosing pictures      outcome.js    changed answers, rankings
   forms.js     words of each task     inspect.js    the linked view of picture, words and answers (window.visling)
   server.js    the HTTP interface     theme.js      light or dark */

import { find, make, percent, show } from "./dom.js";
import { FORMS, familyName, isComparable, modelName } from "./forms.js";
import { drawDifference, drawRanking } from "./outcome.js";
import * as permalink from "./permalink.js";
import { OWN_PICTURE } from "./permalink.js";
import { Pictures } from "./pictures.js";
import * as server from "./server.js";

const NO_EDIT = { words: [], regions: [], boxes: [] };
const SLOW = 700; // milliseconds after which the seconds of a running question are counted
const FEWEST_CHOICES = 2;
const MOST_OFFERS = 5;

class App {
  /** @param models of `/api/models`; at least one.
      @param examples of `/api/examples`. */
  constructor(models, examples) {
    this.models = new Map(models.map((model) => [model.run, model]));
    this.examples = examples;
    this.names = new Map(examples.map(({ id, name }) => [id, name]));
    this.pictures = new Pictures(examples, {
      onChange: () => this.changePictures(),
      onError: (error) => this.showError(error),
    });
    this.edit = NO_EDIT;
    this.looked = null; // id of the picture of a ranking that is looked into
    this.answered = null; // {question, documents} on the screen
    this.view = {};
    this.running = null; // AbortController of the question that is being answered
    this.listen();
  }

  // ---- the form

  get model() {
    return this.models.get(find("run").value);
  }

  get second() {
    return this.models.get(find("second").value) ?? null;
  }

  get asked() {
    return [this.model, this.second].filter(Boolean);
  }

  get form() {
    return FORMS[this.model.form];
  }

  get choices() {
    return this.model.choices ? [...find("choice-list").querySelectorAll("input")].map((input) => input.value.trim()) : [];
  }

  nameModel(model) {
    return modelName(model, [...this.models.values()]);
  }

  fillModels() {
    find("run").replaceChildren(
      ...[...this.models.values()].map((model) => make("option", { value: model.run }, this.nameModel(model))),
    );
  }

  /** Shows the form of a model's task. */
  chooseModel(run, second = "") {
    find("run").value = run;
    const others = [...this.models.values()].filter((other) => isComparable(this.model, other));
    find("second").replaceChildren(
      make("option", { value: "" }, others.length ? "nothing" : "no other model reads the same"),
      ...others.map((other) => make("option", { value: other.run }, this.nameModel(other))),
    );
    find("second").value = others.some((other) => other.run === second) ? second : "";
    find("second").disabled = !others.length;
    const { label, hint } = this.form;
    find("text-label").textContent = label;
    find("text-hint").textContent = hint;
    show(find("text-hint"), hint !== "");
    this.pictures.setCount(this.model.form === "retrieval" ? 0 : this.model.images);
    show(find("choices"), this.model.choices);
    if (this.model.choices && !find("choice-list").children.length) this.setChoices(["", ""]);
    this.drawChips();
    this.drawFacts();
    this.setBusy(false);
  }

  setChoices(texts) {
    const list = find("choice-list");
    list.replaceChildren();
    for (const text of texts) this.addChoice(text);
  }

  addChoice(text = "") {
    const list = find("choice-list");
    const input = make("input", { type: "text", value: text });
    const remove = make("button", { type: "button", class: "quiet icon" }, "×");
    remove.addEventListener("click", () => {
      const place = [...list.children].indexOf(item);
      item.remove();
      this.numberChoices();
      (list.children[place] ?? list.lastElementChild).querySelector("input").focus();
    });
    const item = make("li", {}, input, remove);
    list.append(item);
    this.numberChoices();
    return input;
  }

  numberChoices() {
    const items = [...find("choice-list").children];
    items.forEach((item, place) => {
      item.querySelector("input").setAttribute("aria-label", `Choice ${place + 1}`);
      const remove = item.querySelector("button");
      remove.setAttribute("aria-label", `Remove choice ${place + 1}`);
      remove.disabled = items.length <= FEWEST_CHOICES;
    });
  }

  /** Things to try: questions about the chosen picture, then those of the model. */
  get offers() {
    const about = this.examples.find(({ id }) => id === this.pictures.chosen[0]?.id)?.questions ?? [];
    const own = this.model.form === "vqa" ? about.map((text) => ({ text })) : [];
    return [...own, ...this.model.examples].slice(0, MOST_OFFERS);
  }

  drawChips() {
    const chips = this.offers.map((offer) => {
      const chip = make("button", { type: "button" }, offer.text);
      chip.addEventListener("click", () => {
        this.fillIn(offer);
        this.looked = null;
        this.ask();
      });
      return make("li", {}, chip);
    });
    find("chips").replaceChildren(...chips);
    show(find("chips"), chips.length > 0);
  }

  /** Puts something to try into the form. */
  fillIn({ text, images = [], choices = [] }) {
    find("text").value = text;
    if (images.length && this.model.form !== "retrieval") this.pictures.choose(images);
    if (this.model.choices && choices.length) this.setChoices(choices);
  }

  /** Asks the first thing to try, so that there is something to look at. */
  askFirst() {
    const [offer] = this.offers;
    find("text").value = "";
    if (offer) this.fillIn(offer);
    if (offer && this.pictures.complete) this.ask({ push: false, view: {} });
    else this.showEmpty();
  }

  /** What answers, and where it comes from. */
  drawFacts() {
    const columns = this.asked.map((model, place) => {
      const document_ = this.answered?.documents[place];
      const checkpoint = document_?.model.name !== undefined && this.answered.question.runs[place] === model.run;
      const facts = [
        ["Model", familyName(model.family)],
        ["Task", model.task],
        ["Run", model.run],
        ["Checkpoint", model.checkpoint ?? (checkpoint ? document_.model.checkpoint : null)],
        ["Licence", model.licence],
      ];
      return facts
        .filter(([, fact]) => fact)
        .map(([term, fact]) => make("div", {}, make("dt", {}, term), make("dd", {}, fact)));
    });
    find("facts").replaceChildren(...columns.flat());
  }

  // ---- asking

  /** What the form says now.
      @param images ids for the server. */
  describe(images) {
    return {
      runs: this.asked.map((model) => model.run),
      images,
      text: find("text").value.trim(),
      choices: this.choices.filter(Boolean),
      edit: this.edit,
    };
  }

  /** Asks what the form says.
      @param push whether Back returns to what was asked before.
      @param edit what is taken away from the question.
      @param view how the answer is looked at. */
  async ask({ push = true, edit = NO_EDIT, view = this.view } = {}) {
    this.running?.abort();
    const running = new AbortController();
    this.running = running;
    this.edit = edit;
    this.view = view;
    this.clearMessage();
    this.setBusy(true);
    try {
      await this.process(running.signal, push);
    } catch (error) {
      if (error.name === "AbortError") {
        if (this.running === running) this.say("Cancelled.");
      } else if (this.running === running) {
        this.showError(error, () => this.ask({ push, edit, view }));
      }
    } finally {
      if (this.running === running) {
        this.running = null;
        this.setBusy(false);
      }
    }
  }

  async process(signal, push) {
    if (this.model.form === "retrieval") {
      await this.processSearch(signal, push);
      return;
    }
    let images = await this.pictures.send(signal);
    let documents;
    try {
      documents = await this.inspectAll(images, signal);
    } catch (error) {
      if (error.status !== 404 || !this.pictures.hasOwn) throw error;
      images = await this.pictures.send(signal, true);
      documents = await this.inspectAll(images, signal);
    }
    this.showDocuments(this.describe(images), documents, push);
  }

  async processSearch(signal, push) {
    const question = this.describe([]);
    const rankings = await Promise.all(question.runs.map((run) => server.search({ run, text: question.text }, signal)));
    const looked = this.looked;
    show(find("empty"), false);
    find("ranking").replaceChildren(
      ...rankings.map((ranking, place) =>
        drawRanking(ranking, this.names, this.nameColumn(place), (id) => {
          this.looked = id;
          this.ask();
        }),
      ),
    );
    show(find("ranking"));
    find("ranking").dataset.columns = rankings.length;
    if (looked === null) {
      this.closeView();
      this.answered = { question, documents: [] };
      this.remember(push);
      this.say(`${rankings[0].length} pictures ranked; the first is ${this.names.get(rankings[0][0]?.id)}.`, true);
      return;
    }
    const documents = await this.inspectAll([looked], signal);
    this.showDocuments(this.describe([looked]), documents, push);
    find("inspection").scrollIntoView({ block: "start" });
  }

  inspectAll(images, signal) {
    const { runs, text, choices, edit } = this.describe(images);
    const body = { images, text, choices, without_words: edit.words, without_regions: edit.regions };
    return Promise.all(runs.map((run) => server.inspect({ run, ...body }, signal)));
  }

  // ---- showing

  showDocuments(question, documents, push) {
    const before = this.answered;
    this.answered = { question, documents };
    show(find("empty"), false);
    show(find("ranking"), this.model.form === "retrieval");
    this.showDifference(before);
    this.showEdit();
    find("inspection").replaceChildren();
    show(find("inspection"));
    this.controller = window.visling.render(find("inspection"), documents, {
      state: this.view,
      onState: (view) => {
        this.view = view;
        this.remember(false);
      },
      onEdit: (edit) => this.ask({ edit: { ...NO_EDIT, ...edit } }),
    });
    this.drawFacts();
    this.remember(push);
    const answers = documents.map((document_, place) => {
      const [best] = document_.answers;
      const name = documents.length > 1 ? `${this.nameColumn(place)}: ` : "";
      return best ? `${name}${best.text}, ${percent(best.probability)}.` : `${name}no answer.`;
    });
    this.say(answers.join(" "), true);
  }

  /** Announces something.
      @param seen whether the page shows it anyhow. */
  say(text, seen = false) {
    find("status").textContent = text;
    find("status").classList.toggle("unseen", seen);
  }

  nameColumn(place) {
    return this.nameModel(this.asked[place]);
  }

  /** The answers before and after a change, if there was one that leaves them comparable. */
  showDifference(before) {
    const { question, documents } = this.answered;
    const section = find("difference");
    const same = before && before.documents.length && String(before.question.runs) === String(question.runs);
    const changes = same ? listChanges(before.question, question, before.documents[0]) : [];
    show(section, changes.length > 0);
    if (!changes.length) return;
    const close = make("button", { type: "button", class: "quiet" }, "Hide");
    close.addEventListener("click", () => {
      show(section, false);
      find("result").focus();
    });
    section.replaceChildren(
      make("div", { class: "headline" }, make("h2", { id: "difference-title" }, "Before and now"), close),
      make("p", { class: "hint" }, changes.join("; ")),
      make(
        "div",
        { class: "tables" },
        ...documents.map((document_, place) =>
          drawDifference(before.documents[place], document_, documents.length > 1 ? this.nameColumn(place) : ""),
        ),
      ),
    );
  }

  showEdit() {
    const section = find("edit");
    const { words, regions } = this.edit;
    show(section, words.length + regions.length > 0);
    const restore = make("button", { type: "button", class: "quiet" }, "Put everything back");
    restore.addEventListener("click", () => this.ask());
    section.replaceChildren(make("p", {}, `Answered without ${words.length + regions.length} parts.`), restore);
  }

  closeView() {
    this.controller = null;
    show(find("inspection"), false);
    show(find("difference"), false);
    show(find("edit"), false);
  }

  setBusy(busy) {
    document.body.classList.toggle("busy", busy);
    find("result").setAttribute("aria-busy", String(busy));
    find("submit").textContent = busy ? "Cancel" : this.form.verb;
    clearInterval(this.clock);
    if (!busy) return;
    this.say("Asking …", true);
    const begun = performance.now();
    this.clock = setInterval(() => {
      find("submit").textContent = `Cancel (${Math.round((performance.now() - begun) / 1000)} s)`;
    }, SLOW);
  }

  /** Shows what went wrong, and moves there.
      @param again what to do when the reader tries again. */
  showError(error, again) {
    if (!(error instanceof server.ServerError)) throw error;
    const message = find("message");
    message.replaceChildren(make("p", {}, error.message));
    if (again && error.status === 0) {
      const retry = make("button", { type: "button" }, "Try again");
      retry.addEventListener("click", again);
      message.append(retry);
    }
    show(message);
    this.say("");
    message.focus();
  }

  clearMessage() {
    show(find("message"), false);
  }

  showEmpty() {
    const { images } = this.model;
    const what = this.model.form === "retrieval" ? "Write a caption" : images > 1 ? "Choose two pictures" : "Choose a picture";
    find("empty").replaceChildren(
      make("h2", {}, "See what a model looks at"),
      make("p", {}, `${what}, ${this.model.form === "retrieval" ? "and the pictures at hand are ranked by it" : "ask, and follow its attention between words and boxes"}.`),
    );
    show(find("empty"));
  }

  // ---- the address

  remember(push) {
    const { question } = this.answered;
    const images = this.model.form === "retrieval" ? question.images : this.pictures.linked;
    const [run, second] = question.runs;
    const fragment = `#${permalink.write({ ...question, run, second, images, view: this.view })}`;
    const kept = { images: this.model.form === "retrieval" ? question.images : this.pictures.ids };
    document.title = question.text ? `${question.text} · visling` : "visling: look inside";
    if (push && fragment !== location.hash) history.pushState(kept, "", fragment);
    else history.replaceState(kept, "", fragment);
  }

  /** Brings the page into the state of its address. */
  restore() {
    const wanted = permalink.read(location.hash);
    if (wanted === null) {
      this.chooseModel(this.models.keys().next().value);
      this.askFirst();
      return;
    }
    if (!this.models.has(wanted.run)) {
      this.chooseModel(this.models.keys().next().value);
      this.showEmpty();
      this.showError(new server.ServerError(
        `This link asks the run ${wanted.run}, which is not served here. Served: ${[...this.models.keys()].join(", ")}.`, 404,
      ));
      return;
    }
    this.chooseModel(wanted.run, wanted.second);
    find("text").value = wanted.text;
    if (this.model.choices && wanted.choices.length) this.setChoices(wanted.choices);
    this.view = wanted.view;
    if (this.model.form === "retrieval") {
      this.looked = wanted.images[0] ?? null;
    } else {
      const ids = history.state?.images ?? wanted.images;
      this.pictures.choose(Array.from({ length: this.model.images }, (_, place) => ids[place] ?? OWN_PICTURE));
      this.drawChips();
      if (!this.pictures.complete) {
        this.closeView();
        this.showEmpty();
        this.showError(new server.ServerError(
          "This link was made with a picture that is not on this server: links cannot carry pictures of your own. " +
          "Choose the picture, then ask again.", 404,
        ));
        return;
      }
    }
    this.ask({ push: false, edit: wanted.edit, view: wanted.view });
  }

  async copyLink() {
    let said = "Link copied";
    try {
      await navigator.clipboard.writeText(location.href);
    } catch {
      said = "Copy it from the address bar";
    }
    if (this.pictures.hasOwn) said += "; your own picture is not in it";
    this.say(`${said}.`, true);
    find("copy-link").textContent = said;
    setTimeout(() => {
      find("copy-link").textContent = "Copy link";
    }, 4000);
  }

  // ---- events

  changePictures() {
    this.clearMessage();
    this.drawChips();
  }

  listen() {
    find("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) {
        this.running.abort();
        return;
      }
      this.looked = null;
      this.ask();
    });
    find("text").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      find("ask").requestSubmit();
    });
    find("run").addEventListener("change", () => {
      const second = find("second").value;
      this.running?.abort();
      this.closeView();
      show(find("ranking"), false);
      this.answered = null;
      this.looked = null;
      this.clearMessage();
      this.say("");
      this.chooseModel(find("run").value, second);
      this.askFirst();
    });
    find("second").addEventListener("change", () => {
      this.drawFacts();
      if (this.answered) this.ask();
    });
    find("add-choice").addEventListener("click", () => this.addChoice().focus());
    find("copy-link").addEventListener("click", () => this.copyLink());
    addEventListener("popstate", () => this.restore());
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running) this.running.abort();
    });
  }
}

/** What differs between two questions, as phrases. */
function listChanges(before, after) {
  const changes = [];
  if (before.text !== after.text) changes.push(`“${before.text}” became “${after.text}”`);
  if (String(before.images) !== String(after.images)) changes.push("another picture");
  if (String(before.choices) !== String(after.choices)) changes.push("other choices");
  if (JSON.stringify(before.edit) !== JSON.stringify(after.edit)) changes.push("parts taken away");
  return changes;
}

function listenToTheme() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const button = find("theme");
  const draw = () => button.setAttribute("aria-checked", String(dark()));
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    draw();
    try {
      localStorage.setItem("visling-theme", root.dataset.theme);
    } catch {
      // Kept for this page alone.
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

async function start() {
  listenToTheme();
  try {
    const [models, examples] = await Promise.all([server.listModels(), server.listExamples()]);
    const app = new App(models, examples);
    app.fillModels();
    app.restore();
  } catch (error) {
    if (!(error instanceof server.ServerError)) throw error;
    find("message").replaceChildren(make("p", {}, error.message));
    show(find("message"));
    show(find("ask"), false);
    find("message").focus();
  }
}

start();
