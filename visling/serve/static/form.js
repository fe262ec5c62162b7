/* The form: which models are asked, about which pictures, in which words. */

import { find, make, show } from "./dom.js";
import { Pictures } from "./pictures.js";
import { FORMS, isComparable, modelName } from "./wording.js";

const FEWEST_CHOICES = 2;
const MOST_OFFERS = 4;

export class Form {
  /** @param models of `/api/models`; at least one.
      @param examples of `/api/examples`.
      @param onPicture called after the reader chose a picture.
      @param onOffer called after the reader chose something to try.
      @param onError called with what went wrong with a picture. */
  constructor(models, examples, { onPicture, onOffer, onError }) {
    this.models = new Map(models.map((model) => [model.run, model]));
    this.examples = examples;
    this.onOffer = onOffer;
    this.pictures = new Pictures(examples, {
      onChange: () => {
        this.drawOffers();
        onPicture();
      },
      onError,
    });
    find("run").replaceChildren(...models.map((model) => make("option", { value: model.run }, this.nameModel(model))));
    find("add-choice").addEventListener("click", () => this.addChoice().focus());
  }

  get model() {
    return this.models.get(find("run").value);
  }

  get second() {
    return this.models.get(find("second").value) ?? null;
  }

  get asked() {
    return [this.model, this.second].filter(Boolean);
  }

  /** Whether a caption searches the pictures at hand. */
  get isSearch() {
    return this.model.form === "retrieval";
  }

  /** The words of the task. */
  get words() {
    return FORMS[this.model.form];
  }

  get choices() {
    const inputs = this.model.choices ? [...find("choice-list").querySelectorAll("input")] : [];
    return inputs.map((input) => input.value.trim());
  }

  nameModel(model) {
    return modelName(model, [...this.models.values()]);
  }

  /** Shows the form of a model's task; the first model's by default. */
  chooseModel(run = this.models.keys().next().value, second = "") {
    find("run").value = run;
    const others = [...this.models.values()].filter((other) => isComparable(this.model, other));
    find("second").replaceChildren(
      make("option", { value: "" }, "with nothing"),
      ...others.map((other) => make("option", { value: other.run }, `with ${this.nameModel(other)}`)),
    );
    find("second").value = others.some((other) => other.run === second) ? second : "";
    for (const id of ["second", "second-label"]) show(find(id), others.length > 0);
    const { label, hint } = this.words;
    find("text-label").textContent = label;
    find("text-hint").textContent = hint;
    show(find("text-hint"), hint !== "");
    this.pictures.setCount(this.isSearch ? 0 : this.model.images);
    show(find("choices"), this.model.choices);
    if (!find("choice-list").children.length) this.setChoices(["", ""]);
    this.drawOffers();
  }

  /** Puts choices into the form, if the task reads any. */
  setChoices(texts) {
    if (!this.model.choices) return;
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
    const texts = new Map();
    for (const offer of [...own, ...this.model.examples]) if (!texts.has(offer.text)) texts.set(offer.text, offer);
    return [...texts.values()].slice(0, MOST_OFFERS);
  }

  drawOffers() {
    const chips = this.offers.map((offer) => {
      const chip = make("button", { type: "button", title: offer.text }, offer.text);
      chip.addEventListener("click", () => {
        this.fillIn(offer);
        this.onOffer();
      });
      return make("li", {}, chip);
    });
    find("chips").replaceChildren(...chips);
    show(find("chips"), chips.length > 0);
  }

  /** Puts something to try into the form. */
  fillIn({ text, images = [], choices = [] }) {
    find("text").value = text;
    if (images.length && !this.isSearch) this.pictures.choose(images);
    if (choices.length) this.setChoices(choices);
  }
}
