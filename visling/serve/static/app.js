/* The page of `visling serve`: what is asked, of which models, and where the answers go.

   index.html   the frame              permalink.js  the state in the address
   form.js      models, text, choices  pictures.js   choosing pictures
   wording.js   words of each task     outcome.js    changed answers, rankings
   server.js    the HTTP interface     edits.js      what the reader takes away
   theme.js     light or dark          inspect.js    the linked view of picture, words and answers (window.visling) */

import { find, make, percent, show } from "./dom.js";
import { NO_EDIT, extend, isEmpty, listParts, toRequest, translate } from "./edits.js";
import { Form } from "./form.js";
import { drawDifference, drawRanking } from "./outcome.js";
import * as permalink from "./permalink.js";
import { OWN_PICTURE } from "./permalink.js";
import * as server from "./server.js";
import { familyName } from "./wording.js";

const SLOW = 700; // milliseconds after which the seconds of a running question are counted

class App {
  /** @param models of `/api/models`; at least one.
      @param examples of `/api/examples`. */
  constructor(models, examples) {
    this.form = new Form(models, examples, {
      onPicture: () => show(find("message"), false),
      onOffer: () => {
        this.looked = null;
        this.askAnew();
      },
      onError: (error) => this.showError(error),
    });
    this.pictures = this.form.pictures;
    this.names = new Map(examples.map(({ id, name }) => [id, name]));
    this.looked = null; // id of the picture of a ranking that is looked into
    this.base = null; // {question, documents} of the unchanged question
    this.answered = null; // {question, documents} on the screen
    this.view = {}; // how it is looked at: state of the linked view
    this.hasAsked = false; // whether the reader asked something; the first question is the page's own
    this.running = null; // AbortController of the question that is being answered
    this.listen();
  }

  // ---- asking

  chooseModel(run, second) {
    this.form.chooseModel(run, second);
    this.drawFacts();
    this.setBusy(false);
  }

  /** Asks the first thing to try, so that there is something to look at. */
  askFirst() {
    const [offer] = this.form.offers;
    find("text").value = "";
    if (offer) this.form.fillIn(offer);
    if (offer && this.pictures.complete) this.ask({ push: false });
    else this.showEmpty();
  }

  /** What answers, and where it comes from. */
  drawFacts() {
    const columns = this.form.asked.map((model, place) => [
      ["Model", familyName(model.family)],
      ["Task", model.task],
      ["Run", model.run],
      ["Weights", this.answered?.documents[place]?.model.checkpoint ?? "shown with the answer"],
    ]);
    find("facts").replaceChildren(
      ...columns.flat().map(([term, fact]) => make("div", {}, make("dt", {}, term), make("dd", {}, fact))),
    );
  }

  /** What the form says.
      @param images ids for the server. */
  describe(images) {
    return {
      runs: this.form.asked.map((model) => model.run),
      images,
      text: find("text").value.trim(),
      choices: this.form.choices.filter(Boolean),
      edit: NO_EDIT,
    };
  }

  /** Asks what the reader entered; what was chosen of the answer before has no meaning in the next one. */
  askAnew() {
    this.view = { ...this.view, answer: null, versus: null, row: null, lock: null };
    this.hasAsked = true;
    return this.ask();
  }

  /** Asks what the form says.
      @param push whether Back returns to what was asked before.
      @param edit what is then taken away from it. */
  ask({ push = true, edit = NO_EDIT } = {}) {
    return this.run(
      async (signal) => {
        if (this.form.isSearch) await this.search(signal, push);
        else await this.inspectForm(signal, push);
        if (!isEmpty(edit) && this.base) await this.inspectChanged(edit, signal, push);
      },
      () => this.ask({ push, edit }),
    );
  }

  /** Asks again without some parts of what is on the screen. */
  askWithout(edit) {
    this.view = { ...this.view, lock: null };
    return this.run(
      (signal) => this.inspectChanged(edit, signal, true),
      () => this.askWithout(edit),
    );
  }

  /** Runs what asks the server, in place of what is running.
      @param again what to do when it failed and the reader tries again. */
  async run(work, again) {
    this.running?.abort();
    const running = new AbortController();
    this.running = running;
    show(find("message"), false);
    this.setBusy(true);
    try {
      await work(running.signal);
    } catch (error) {
      if (this.running !== running) return;
      if (error.name === "AbortError") this.say("Cancelled.");
      else this.showError(error, again);
      if (this.answered?.documents.length) this.draw(); // without marks of what was to be taken away
    } finally {
      if (this.running === running) {
        this.running = null;
        this.setBusy(false);
      }
    }
  }

  async inspectForm(signal, push) {
    let question;
    let documents;
    try {
      question = this.describe(await this.pictures.send(signal));
      documents = await this.inspectAll(question, signal);
    } catch (error) {
      if (error.status !== 404 || !this.pictures.hasOwn) throw error;
      question = this.describe(await this.pictures.send(signal, true));
      documents = await this.inspectAll(question, signal);
    }
    this.showAnswer(question, documents, push);
  }

  async inspectChanged(edit, signal, push) {
    const question = { ...this.base.question, edit };
    const documents = isEmpty(edit) ? this.base.documents : await this.inspectAll(question, signal);
    this.showAnswer(question, documents, push);
  }

  /** The documents of a question, one for each model. */
  inspectAll({ runs, images, text, choices, edit }, signal) {
    const { documents } = this.base ?? {};
    return Promise.all(
      runs.map((run, place) => {
        const own = isEmpty(edit) ? edit : translate(edit, documents[0], documents[place]);
        const blind = this.form.models.get(run).images === 0;
        const changes = toRequest(blind ? { ...own, boxes: [] } : own);
        return server.inspect({ run, images: blind ? [] : images, text, choices, ...changes }, signal);
      }),
    );
  }

  async search(signal, push) {
    const question = this.describe(this.looked === null ? [] : [this.looked]);
    const { text, runs } = question;
    const rankings = await Promise.all(runs.map((run) => server.search({ run, text }, signal)));
    const documents = this.looked === null ? [] : await this.inspectAll(question, signal);
    const pick = (id) => {
      this.looked = id;
      this.askAnew();
    };
    find("ranking").replaceChildren(
      ...rankings.map((ranking, place) =>
        drawRanking(ranking, this.names, runs.length > 1 ? this.nameColumn(place) : "", this.looked, pick),
      ),
    );
    find("ranking").dataset.columns = rankings.length;
    show(find("ranking"));
    show(find("empty"), false);
    this.reveal(find("result"));
    if (documents.length) {
      this.showAnswer(question, documents, push);
      find("inspection").scrollIntoView({ block: "start" });
      return;
    }
    this.closeView();
    this.answered = { question, documents };
    this.remember(push);
    const first = this.names.get(rankings[0][0].id);
    this.say(`${rankings[0].length} pictures ranked; the first is ${first}.`, true);
  }

  // ---- showing

  showAnswer(question, documents, push) {
    const before = isEmpty(question.edit) ? this.answered : this.base;
    this.answered = { question, documents };
    if (isEmpty(question.edit)) this.base = this.answered;
    show(find("empty"), false);
    show(find("inspection"));
    this.reveal(find("result"));
    this.showDifference(before);
    this.showEdit();
    this.draw();
    this.drawFacts();
    this.remember(push);
    const answers = documents.map((document_, place) => {
      const [best] = document_.answers;
      const name = documents.length > 1 ? `${this.nameColumn(place)}: ` : "";
      return best ? `${name}${best.text}, ${percent(best.probability)}.` : `${name}no answer.`;
    });
    this.say(answers.join(" "), true);
  }

  /** Draws the linked view of what is on the screen. */
  draw() {
    const { documents, question } = this.answered;
    this.controller?.destroy();
    this.controller = window.visling.render(find("inspection"), documents, {
      state: this.view,
      before: isEmpty(question.edit) ? undefined : this.base.documents,
      onState: (view) => {
        this.view = view;
        this.remember(false);
      },
      onEdit: (change) => this.askWithout(extend(question.edit, change, documents, this.base.documents)),
    });
  }

  /** Brings an answer into a window in which the form fills the screen. */
  reveal(part) {
    if (part.getBoundingClientRect().top > innerHeight / 2 && this.hasAsked) part.scrollIntoView({ block: "start" });
  }

  /** Announces something.
      @param seen whether the page shows it anyhow. */
  say(text, seen = false) {
    find("status").textContent = text;
    find("status").classList.toggle("unseen", seen);
  }

  nameColumn(place) {
    return this.form.nameModel(this.form.asked[place]);
  }

  /** The answers before and after a change, if there was one that leaves them comparable. */
  showDifference(before) {
    const { question, documents } = this.answered;
    const section = find("difference");
    const change = describeChange(before, question);
    show(section, change !== "");
    if (!change) return;
    section.open = !isEmpty(question.edit) || section.open;
    find("change").textContent = change;
    find("tables").replaceChildren(
      ...documents.map((document_, place) =>
        drawDifference(before.documents[place], document_, documents.length > 1 ? this.nameColumn(place) : ""),
      ),
    );
  }

  /** What was taken away or drawn, each part to be undone. */
  showEdit() {
    const { edit } = this.answered.question;
    show(find("edit"), !isEmpty(edit));
    const chip = (name, label, rest) => {
      const button = make("button", { type: "button", "aria-label": label }, name);
      button.addEventListener("click", () => this.askWithout(rest));
      return make("li", {}, button);
    };
    const parts = listParts(edit, this.base.documents[0]);
    find("parts").replaceChildren(
      ...parts.map(({ name, rest }) => chip(`${name} ×`, `Undo: ${name}`, rest)),
      ...(parts.length > 1 ? [chip("undo all", "Undo all", NO_EDIT)] : []),
    );
  }

  closeView() {
    this.controller?.destroy();
    this.controller = null;
    this.base = this.answered = null;
    for (const part of ["inspection", "difference", "edit"]) show(find(part), false);
  }

  setBusy(busy) {
    document.body.classList.toggle("busy", busy);
    find("result").setAttribute("aria-busy", String(busy));
    find("submit").textContent = busy ? "Cancel" : this.form.words.verb;
    clearInterval(this.clock);
    if (!busy) return;
    this.say("Asking …", true);
    const begun = performance.now();
    this.clock = setInterval(() => {
      find("submit").textContent = `Cancel (${Math.round((performance.now() - begun) / 1000)} s)`;
    }, SLOW);
  }

  /** Shows what the server says went wrong.
      @param again what to do when the reader tries again. */
  showError(error, again) {
    if (!(error instanceof server.ServerError)) throw error;
    this.say("");
    showMessage(error.message, error.status === 0 ? again : undefined);
  }

  showEmpty() {
    find("empty").replaceChildren(
      make("h2", {}, "See what a model looks at"),
      make("p", {}, this.form.words.start),
    );
    show(find("empty"));
  }

  // ---- the address

  remember(push) {
    const { question } = this.answered;
    const [run, second] = question.runs;
    const images = this.pictures.link(question.images);
    const fragment = `#${permalink.write({ ...question, run, second, images, view: this.view })}`;
    const kept = { images: question.images }; // the reader's own are found again while the page is open
    document.title = question.text ? `${question.text} · visling` : "visling: look inside";
    if (push && fragment !== location.hash) history.pushState(kept, "", fragment);
    else history.replaceState(kept, "", fragment);
  }

  /** Brings the page into the state of its address. */
  restore() {
    const wanted = permalink.read(location.hash);
    if (wanted === null) {
      this.chooseModel();
      this.askFirst();
      return;
    }
    const { models } = this.form;
    if (!models.has(wanted.run)) {
      const served = [...models.keys()].join(", ");
      this.chooseModel();
      this.showEmpty();
      showMessage(`This link asks the run ${wanted.run}, which is not served here. Served: ${served}.`);
      return;
    }
    this.chooseModel(wanted.run, wanted.second);
    find("text").value = wanted.text;
    if (wanted.choices.length) this.form.setChoices(wanted.choices);
    this.view = wanted.view;
    if (this.form.isSearch) {
      this.looked = wanted.images[0] ?? null;
    } else {
      show(find("ranking"), false);
      const ids = history.state?.images ?? wanted.images;
      this.pictures.choose(Array.from({ length: this.form.model.images }, (_, place) => ids[place] ?? OWN_PICTURE));
      this.form.drawOffers();
      if (!this.pictures.complete) {
        this.closeView();
        this.showEmpty();
        showMessage(
          "This link was made with a picture that is not on this server: links cannot carry pictures of your own. " +
            "Choose the picture, then ask again.",
        );
        return;
      }
    }
    this.ask({ push: false, edit: wanted.edit });
  }

  async copyLink() {
    let said = "Link copied";
    try {
      await navigator.clipboard.writeText(location.href);
    } catch {
      said = "Copy it from the address bar";
    }
    const linked = this.pictures.link(this.answered?.question.images ?? []);
    if (linked.includes(OWN_PICTURE)) said += "; your own picture is not in it";
    this.say(`${said}.`, true);
    find("copy-link").textContent = said;
    setTimeout(() => {
      find("copy-link").textContent = "Copy link";
    }, 4000);
  }

  // ---- events

  listen() {
    find("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) {
        this.running.abort();
        return;
      }
      this.looked = null;
      this.askAnew();
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
      this.view = {};
      this.looked = null;
      show(find("message"), false);
      this.say("");
      this.chooseModel(find("run").value, second);
      this.askFirst();
    });
    find("second").addEventListener("change", () => {
      if (this.answered) this.ask();
    });
    find("copy-link").addEventListener("click", () => this.copyLink());
    addEventListener("popstate", () => this.restore());
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running) this.running.abort();
    });
  }
}

/** What makes a question differ from the one that was answered before; "" if that is nothing, or more than one thing:
    their answers are then not comparable. */
function describeChange(before, question) {
  if (!before?.documents.length || String(before.question.runs) !== String(question.runs)) return "";
  const old = before.question;
  const changes = [];
  if (old.text !== question.text) changes.push(`“${old.text}” became “${question.text}”`);
  if (String(old.images) !== String(question.images)) changes.push("another picture");
  if (String(old.choices) !== String(question.choices)) changes.push("other choices");
  if (JSON.stringify(old.edit) !== JSON.stringify(question.edit)) changes.push("asked again");
  return changes.length === 1 ? changes[0] : "";
}

async function start() {
  try {
    const [models, examples] = await Promise.all([server.listModels(), server.listExamples()]);
    new App(models, examples).restore();
  } catch (error) {
    if (!(error instanceof server.ServerError)) throw error;
    show(find("ask"), false);
    showMessage(error.message, () => location.reload());
  }
}

/** Shows what went wrong, and moves there.
    @param again what to do when the reader tries again, if that can help. */
function showMessage(text, again) {
  const message = find("message");
  message.replaceChildren(make("p", {}, text));
  if (again) {
    const retry = make("button", { type: "button" }, "Try again");
    retry.addEventListener("click", again);
    message.append(retry);
  }
  show(message);
  message.focus();
}

start();
