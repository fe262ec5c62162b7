/* The index of a gallery: filters, pages of examples, and the linked view of one of them.
 *
 * `examples.js` sets window.visling_gallery to the examples (analysis/gallery_entries.py says what each has); a file
 * views/N.js calls window.visling_view with the documents of an example, which `inspect.js` draws. All are scripts,
 * because a page on a disk may load nothing else. What is shown is in the address, behind "#": filters, page, and the
 * example that is open; reloading or sending the address shows the same.
 */
"use strict";

(() => {
  const PAGE = 60; // examples on a page

  const ORDERS = {
    unsure: (entry) => entry.confidence ?? 2,
    sure: (entry) => -(entry.confidence ?? -1),
    difference: (entry) => -(entry.other?.difference ?? -1),
    words: (entry) => entry.blind?.gain ?? 2,
    image: (entry) => -(entry.blind?.gain ?? -2),
    proven: (entry) => -(entry.removal ?? -2),
    unproven: (entry) => entry.removal ?? 2,
  };

  const VERDICTS = {
    right: (entry) => entry.right === true,
    wrong: (entry) => entry.right === false,
    gained: (entry) => entry.right === true && entry.other?.right === false,
    lost: (entry) => entry.right === false && entry.other?.right === true,
  };

  const BLIND = {
    alone: (entry) => entry.blind?.alone === true,
    image: (entry) => entry.blind !== null && !entry.blind.alone,
  };

  const REMOVAL = {
    proven: (entry) => entry.removal !== null && entry.removal > 0,
    unproven: (entry) => entry.removal !== null && entry.removal <= 0,
  };

  /** An HTML element with properties and children. */
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const percent = (share) => (share === null ? "" : `${Math.round(100 * share)} %`);

  const points = (gain) => `${gain < 0 ? "−" : ""}${Math.abs(Math.round(100 * gain))} points`;

  /** What the address says behind "#". */
  class Address {
    read() {
      return new URLSearchParams(location.hash.slice(1));
    }

    /** Replace some of its values; empty ones go. */
    write(changes) {
      const values = this.read();
      for (const [name, value] of Object.entries(changes)) {
        if (value === "" || value === null) values.delete(name);
        else values.set(name, value);
      }
      history.replaceState(null, "", `#${values}`);
    }
  }

  /** Loads the documents of examples, each once. */
  class Documents {
    constructor() {
      this.waiting = new Map();
      window.visling_view = (name, documents) => this.waiting.get(name)?.resolve(documents);
    }

    load(file) {
      const name = file.replace(/^.*\//, "").replace(/\.js$/, "");
      if (!this.waiting.has(name)) {
        const entry = {};
        entry.promise = new Promise((resolve, reject) => {
          entry.resolve = resolve;
          const script = make("script", { src: file, onerror: () => reject(new Error(`${file} cannot be read`)) });
          document.head.append(script);
        });
        this.waiting.set(name, entry);
      }
      return this.waiting.get(name).promise;
    }
  }

  /** The filters, the grid and the view. */
  class Gallery {
    constructor(entries) {
      this.entries = entries;
      this.address = new Address();
      this.documents = new Documents();
      this.form = document.getElementById("filters");
      this.grid = document.getElementById("gallery");
      this.count = document.getElementById("count");
      this.view = document.getElementById("view");
      this.runs = this.grid.dataset.runs.split(" | ");
      this.page = 0;
      this.open = null; // the entry that is shown
      this.controller = null;
      this.form.addEventListener("input", () => this.filter());
      this.form.addEventListener("submit", (event) => event.preventDefault());
      this.form.addEventListener("reset", () => setTimeout(() => this.filter()));
      for (const button of document.querySelectorAll("button[data-key]")) {
        button.addEventListener("click", () => this.choose(button.dataset.key, button.dataset.group));
      }
      // Before the view hears of a key: Esc frees what is locked there, and only then closes it.
      document.addEventListener("keydown", () => (this.locked = Boolean(this.controller?.state?.lock)), true);
      document.addEventListener("keydown", (event) => this.press(event));
      this.view.addEventListener("cancel", (event) => event.preventDefault()); // Esc is handled in `press`
      window.addEventListener("hashchange", () => this.restore());
      this.restore();
    }

    /** Show what the address says. */
    restore() {
      const values = this.address.read();
      for (const field of this.form.elements) {
        if (field.name) field.value = values.get(field.name) ?? "";
        if (field.name && field.value !== (values.get(field.name) ?? "")) field.value = "";
      }
      this.select();
      this.page = Math.min(Number(values.get("page") ?? 1) - 1 || 0, this.pages - 1);
      this.draw();
      const wanted = values.get("example");
      const entry = this.entries.find((one) => one.id === wanted);
      if (entry) this.show(entry, values.get("view"));
      else this.close();
    }

    get pages() {
      return Math.max(1, Math.ceil(this.chosen.length / PAGE));
    }

    /** Read the form: which entries are shown, in which order. */
    select() {
      const values = Object.fromEntries([...this.form.elements].filter((f) => f.name).map((f) => [f.name, f.value]));
      const words = (values.words ?? "").toLowerCase().split(/\s+/).filter(Boolean);
      const tests = [];
      if (words.length) {
        tests.push((entry) => {
          const text = `${entry.text} ${entry.answer} ${entry.truth} ${entry.id}`.toLowerCase();
          return words.every((word) => text.includes(word));
        });
      }
      if (values.verdict) tests.push(VERDICTS[values.verdict]);
      if (values.blind) tests.push(BLIND[values.blind]);
      if (values.removal) tests.push(REMOVAL[values.removal]);
      if (values.answer) tests.push((entry) => entry.answer === values.answer);
      for (const key of Object.keys(this.entries[0]?.groups ?? {})) {
        if (values[key]) tests.push((entry) => entry.groups[key] === values[key]);
      }
      this.chosen = this.entries.filter((entry) => tests.every((test) => test(entry)));
      const order = ORDERS[values.order];
      if (order) this.chosen = this.chosen.toSorted((a, b) => order(a) - order(b));
      for (const field of this.form.elements) field.classList.toggle("on", Boolean(field.name && field.value));
    }

    filter() {
      this.select();
      this.page = 0;
      const fields = [...this.form.elements].filter((field) => field.name);
      this.address.write({ ...Object.fromEntries(fields.map((f) => [f.name, f.value])), page: "" });
      this.draw();
    }

    choose(key, group) {
      const field = this.form.elements[key];
      if (!field) return;
      field.value = group;
      this.filter();
      this.form.scrollIntoView({ block: "start" });
    }

    /** The page of examples that is in turn. */
    draw() {
      const first = this.page * PAGE;
      const right = this.chosen.filter((entry) => entry.right).length;
      const scored = this.chosen.filter((entry) => entry.right !== null).length;
      this.count.textContent =
        `${this.chosen.length} of ${this.entries.length} examples` +
        (scored ? `, ${right} right (${percent(right / scored)})` : "");
      const list = make("ol", {}, ...this.chosen.slice(first, first + PAGE).map((entry) => this.card(entry)));
      const turn = this.pages > 1 ? this.turner() : null;
      this.grid.replaceChildren(...[list, turn].filter(Boolean));
    }

    turner() {
      const step = (by) => {
        this.page += by;
        this.address.write({ page: this.page ? String(this.page + 1) : "" });
        this.draw();
        this.form.scrollIntoView({ block: "start" });
      };
      return make(
        "nav",
        { className: "turn", ariaLabel: "Pages" },
        make("button", { type: "button", textContent: "← Previous", disabled: !this.page, onclick: () => step(-1) }),
        make("span", { textContent: `page ${this.page + 1} of ${this.pages}` }),
        make("button", { type: "button", textContent: "Next →", disabled: this.page + 1 >= this.pages, onclick: () => step(1) }),
      );
    }

    card(entry) {
      const look = entry.right === null ? "" : entry.right ? "right" : "wrong";
      const sign = { right: "✓ ", wrong: "✗ ", "": "" }[look];
      const pictures = entry.images.map((source) =>
        source
          ? make("img", { src: source, alt: "", loading: "lazy" })
          : make("span", { className: "none", textContent: "image not found" }),
      );
      if (!pictures.length) pictures.push(make("span", { className: "none", textContent: "words alone" }));
      const more = [entry.groups.type];
      if (entry.other) more.push(`${this.runs[1]}: ${entry.other.answer}`);
      if (entry.blind?.alone) more.push("words alone");
      const link = make(
        "a",
        { className: `entry ${look}`, href: `#example=${encodeURIComponent(entry.id)}` },
        make("span", { className: "pictures" }, ...pictures),
        make(
          "span",
          { className: "body" },
          make("span", { className: "ask", textContent: entry.text }),
          make("span", { className: look, textContent: `${sign}${entry.answer} ${percent(entry.confidence)}` }),
          look === "wrong" ? make("span", { textContent: `truth: ${entry.truth}` }) : null,
          make("span", { className: "more", textContent: more.filter(Boolean).join(" · ") }),
        ),
      );
      link.addEventListener("click", (event) => {
        if (event.metaKey || event.ctrlKey || event.shiftKey) return;
        event.preventDefault();
        this.show(entry);
      });
      return make("li", {}, link);
    }

    /** Open an example. */
    async show(entry, state = null) {
      this.open = entry;
      this.address.write({ example: entry.id, view: state ?? "" });
      this.controller?.destroy?.();
      this.controller = null;
      const place = this.chosen.indexOf(entry);
      const look = entry.right === null ? "" : entry.right ? "right" : "wrong";
      const facts = [`truth: ${entry.truth}`, entry.groups.type];
      if (entry.blind) facts.push(`without the image: ${entry.blind.answer}`, `the image adds ${points(entry.blind.gain)}`);
      if (entry.removal !== null) facts.push(`removal test: ${entry.removal > 0 ? "+" : "−"}${Math.abs(entry.removal).toFixed(2)} against chance`);
      if (entry.other) facts.push(`${this.runs[1]}: ${entry.other.answer} ${percent(entry.other.confidence)}`);
      const button = (text, label, act, disabled = false) =>
        make("button", { type: "button", textContent: text, ariaLabel: label, title: label, onclick: act, disabled });
      const header = make(
        "header",
        {},
        button("←", "Previous example", () => this.step(-1), place <= 0),
        button("→", "Next example", () => this.step(1), place < 0 || place + 1 >= this.chosen.length),
        make(
          "p",
          {},
          make("strong", { textContent: entry.text }),
          " ",
          make("span", {
            className: `verdict ${look}`,
            textContent: `${{ right: "✓", wrong: "✗", "": "" }[look]} ${entry.answer} ${percent(entry.confidence)}`,
          }),
          make("small", { textContent: facts.filter(Boolean).join(" · ") }),
        ),
        make("small", { textContent: place < 0 ? "" : `${place + 1} of ${this.chosen.length}` }),
        button("✕", "Close", () => this.close()),
      );
      const body = make("div", { className: entry.view ? "linked" : "plain" });
      this.view.replaceChildren(header, body);
      if (!this.view.open) this.view.showModal();
      this.view.scrollTop = 0;
      if (!entry.view) {
        body.append(...this.plain(entry));
        return;
      }
      try {
        const documents = await this.documents.load(entry.view);
        if (this.open !== entry) return; // the reader has moved on
        this.controller = window.visling.render(body, documents, {
          state: state ? JSON.parse(state) : {},
          onState: (changed) => this.address.write({ view: JSON.stringify(changed) }),
        });
      } catch (error) {
        body.textContent = `This view cannot be shown: ${error.message}.`;
      }
    }

    /** Pictures and answers of an example without a linked view. */
    plain(entry) {
      const pictures = entry.images.filter(Boolean).map((source) => make("img", { src: source, alt: "" }));
      const bars = entry.top.map(([answer, share]) => {
        const fill = make("span");
        fill.style.width = `${100 * share}%`;
        return make(
          "li",
          {},
          make("span", { textContent: answer }),
          make("span", { className: "bar" }, fill),
          make("span", { textContent: percent(share) }),
        );
      });
      return [make("div", {}, ...pictures), make("ul", { className: "bars" }, ...bars)];
    }

    step(by) {
      const next = this.chosen[this.chosen.indexOf(this.open) + by];
      if (next) this.show(next);
    }

    close() {
      if (!this.open) return;
      const entry = this.open;
      this.open = null;
      this.controller?.destroy?.();
      this.controller = null;
      this.view.close();
      this.view.replaceChildren();
      this.address.write({ example: "", view: "" });
      const place = this.chosen.indexOf(entry);
      if (place >= 0 && Math.floor(place / PAGE) !== this.page) {
        this.page = Math.floor(place / PAGE);
        this.draw();
      }
      this.grid.querySelectorAll(".entry")[place - this.page * PAGE]?.focus();
    }

    press(event) {
      const field = event.target.closest?.("input, select, textarea");
      if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
      if (this.open) {
        if (event.key === "Escape" && this.locked) return;
        if (event.key === "Escape") this.close();
        else if (!field && event.key === "ArrowLeft") this.step(-1);
        else if (!field && event.key === "ArrowRight") this.step(1);
        else return;
        event.preventDefault();
        return;
      }
      if (field) return;
      if (event.key === "/") {
        this.form.elements.words.focus();
        event.preventDefault();
        return;
      }
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns(), ArrowDown: this.columns() }[event.key];
      if (!by) return;
      const cards = [...this.grid.querySelectorAll(".entry")];
      const at = cards.indexOf(document.activeElement);
      const next = cards[at < 0 ? 0 : at + by];
      if (next) {
        next.focus();
        event.preventDefault();
      }
    }

    /** Cards in a row. */
    columns() {
      const tops = [...this.grid.querySelectorAll("li")].map((item) => item.offsetTop);
      return Math.max(1, tops.filter((top) => top === tops[0]).length);
    }
  }

  window.addEventListener("DOMContentLoaded", () => {
    window.visling_index = new Gallery(window.visling_gallery);
  });
})();
