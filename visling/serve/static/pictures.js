/* Choosing the pictures of a question: slots to drop, paste or load them into, and those at hand. */

import { find, make, show } from "./dom.js";
import * as server from "./server.js";
import { OWN_PICTURE } from "./permalink.js";

/* A picture is {id, name, source} and, if the reader brought it, its file. The id of one that is still being sent is
   null; `sent` is the promise of it. */

export class Pictures {
  /** @param examples pictures at hand: [{id, name}].
      @param onChange called after the reader chose a picture.
      @param onError called with what went wrong with one. */
  constructor(examples, { onChange, onError }) {
    this.examples = examples.map(({ id, name }) => ({ id, name, source: server.exampleAddress(id, 640) }));
    this.onChange = onChange;
    this.onError = onError;
    this.own = new Map(); // id -> picture that the reader brought
    this.chosen = [];
    this.active = 0;
    this.#listExamples();
    this.#listen();
  }

  /** How many pictures the question is about. */
  setCount(count) {
    this.chosen = Array.from({ length: count }, (_, place) => this.chosen[place] ?? this.examples[place] ?? null);
    this.active = Math.min(this.active, Math.max(0, count - 1));
    show(find("pictures"), count > 0);
    find("pictures-title").textContent = count > 1 ? "Pictures" : "Picture";
    this.#draw();
  }

  /** Puts pictures with these ids into the slots; a slot whose picture is not at hand stays empty. */
  choose(ids) {
    this.chosen = ids.map((id) => this.examples.find((one) => one.id === id) ?? this.own.get(id) ?? null);
    this.#draw();
  }

  /** Whether every slot has a picture. */
  get complete() {
    return this.chosen.every((picture) => picture !== null);
  }

  /** Ids for the server, once all pictures have been sent.
      @param again whether the reader's own are sent once more: a server forgets them after a while. */
  async send(signal, again = false) {
    const ids = [];
    for (const picture of this.chosen) {
      if (picture === null) continue;
      if (picture.file && (again || picture.id === null)) await this.#upload(picture, signal);
      ids.push(picture.id);
    }
    return ids;
  }

  /** Ids as a link has them: the reader's own pictures cannot be in it. */
  link(ids) {
    return ids.map((id) => (this.own.has(id) ? OWN_PICTURE : id));
  }

  /** Whether the reader brought one of the pictures. */
  get hasOwn() {
    return this.chosen.some((picture) => picture?.file);
  }

  async #upload(picture, signal) {
    const { id } = await server.sendPicture(picture.file, signal);
    picture.id = id;
    this.own.set(id, picture);
  }

  async #take(files, slot = this.active) {
    const pictures = [...files].filter((file) => file.type === "" || file.type.startsWith("image/"));
    if (!pictures.length) {
      this.onError(new server.ServerError("That is no picture: drop an image file (PNG, JPEG, WebP).", 415));
      return;
    }
    for (const file of pictures.slice(0, this.chosen.length - slot)) {
      const before = this.chosen[slot];
      const picture = { id: null, name: file.name || "pasted picture", source: URL.createObjectURL(file), file };
      this.#put(slot, picture);
      try {
        await this.#upload(picture);
      } catch (error) {
        // A server that cannot be reached says nothing about the picture, which stays.
        if (error.status !== 0 && this.chosen[slot] === picture) this.#put(slot, before);
        this.onError(error);
        return;
      }
      slot += 1;
    }
    this.onChange();
  }

  #put(slot, picture) {
    this.chosen[slot] = picture;
    this.#draw();
  }

  #listExamples() {
    const list = find("examples");
    show(list, this.examples.length > 0);
    list.replaceChildren(
      ...this.examples.map((picture) => {
        const input = make("input", { type: "radio", name: "example", value: picture.id });
        input.addEventListener("change", () => {
          this.#put(this.active, picture);
          this.onChange();
        });
        // A click on the one that is marked already: it may be wanted in another slot.
        input.addEventListener("click", () => {
          if (this.chosen[this.active] !== picture) input.dispatchEvent(new Event("change"));
        });
        const image = make("img", { src: server.exampleAddress(picture.id, 160), alt: picture.name, loading: "lazy" });
        return make("label", { title: picture.name }, input, image);
      }),
    );
  }

  #draw() {
    find("slots").replaceChildren(...this.chosen.map((picture, place) => this.#drawSlot(picture, place)));
    const list = find("examples");
    const marked = this.chosen[this.active]?.id;
    for (const input of list.querySelectorAll("input")) {
      input.checked = input.value === marked;
      if (!input.checked) continue;
      const { offsetLeft, offsetWidth } = input.parentElement;
      const seen = offsetLeft >= list.scrollLeft && offsetLeft + offsetWidth <= list.scrollLeft + list.clientWidth;
      if (!seen) list.scrollLeft = offsetLeft - list.clientWidth / 2;
    }
  }

  #drawSlot(picture, place) {
    const several = this.chosen.length > 1;
    const side = several ? ["Left picture", "Right picture"][place] ?? `Picture ${place + 1}` : "Picture";
    const shown = picture
      ? make("img", { src: picture.source, alt: "" })
      : make("span", { class: "nothing" }, "Drop, paste or load a picture");
    const name = picture ? picture.name : "";
    const caption = make("span", { class: "name", title: name }, several ? side.replace(" picture", "") : name);
    const image = shown.tagName === "IMG" ? shown : null;
    image?.addEventListener("error", () =>
      image.replaceWith(make("span", { class: "nothing" }, "This browser cannot show it; the model can read it.")),
    );
    const slot = make("div", { class: "slot" }, shown);
    if (several) {
      const pick = make("button", {
        type: "button", class: "pick", "aria-pressed": String(place === this.active),
        "aria-label": `${side}: ${picture ? picture.name : "none"}. Choose it to exchange it.`,
      });
      pick.addEventListener("click", () => {
        this.active = place;
        this.#draw();
        find("slots").querySelectorAll(".pick")[place].focus();
      });
      slot.append(pick);
      slot.classList.toggle("active", place === this.active);
    }
    const load = make(
      "button",
      { type: "button", class: "load", "aria-label": several ? `Load ${side.toLowerCase()}` : "Load a picture" },
      "Load …",
    );
    load.addEventListener("click", () => {
      this.active = place;
      find("file").click();
    });
    slot.append(make("div", { class: "below" }, caption, load));
    slot.dataset.place = place;
    return slot;
  }

  #listen() {
    const file = find("file");
    file.addEventListener("change", () => {
      if (file.files.length) this.#take(file.files);
      file.value = "";
    });
    document.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length && this.chosen.length) {
        event.preventDefault();
        this.#take(event.clipboardData.files);
      }
    });
    // Anywhere on the page: a picture dropped beside a slot would otherwise replace the page.
    document.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      document.body.classList.add("dragging");
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) document.body.classList.remove("dragging");
    });
    document.addEventListener("drop", (event) => {
      document.body.classList.remove("dragging");
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      if (!this.chosen.length) return;
      const place = event.target.closest?.(".slot")?.dataset.place;
      this.#take(event.dataTransfer.files, place === undefined ? this.active : Number(place));
    });
  }
}
