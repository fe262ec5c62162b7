/* One linked view of a picture, its words and the model's answers.
 *
 *   const controller = visling.render(container, documents, options);
 *
 * documents   of the format "visling-inspection-1" (analysis/inspection.py); several stand side by side, on the same
 *             scale, and hovering one hovers them all.
 * options     state            what is shown first, see DEFAULTS
 *             onState(state)   called whenever that changes
 *             onAnswer(answer, number)   a bar was chosen, in the document of that number
 *             onEdit(edit)     offers to take words and boxes away and to draw a box; edit is {document, row,
 *                              without_words, without_regions: numbers in that row, boxes: [[x1, y1, x2, y2, image]]}
 *             before           for each document: null, or one whose answers are shown for comparison
 * controller  state, set(changes), clear(), exports: {svg(), png(), csv(), json(), caption()}, destroy()
 *
 * One class is one thing on the screen; `Source` holds the numbers, `Controller` the state. Nothing is fetched.
 */
"use strict";

(() => {
  const FORMAT = "visling-inspection-1";

  const DIRECTIONS = {
    text_to_regions: { from: "words", to: "regions", label: "words → boxes", says: "this word looks at these boxes" },
    regions_to_text: { from: "regions", to: "words", label: "boxes → words", says: "this box looks at these words" },
    text_to_text: { from: "words", to: "words", label: "words → words", says: "this word looks at these words" },
    regions_to_regions: {
      from: "regions",
      to: "regions",
      label: "boxes → boxes",
      says: "this box looks at these boxes",
    },
  };

  const METHODS = {
    relevance: {
      name: "Relevance",
      says: "attention weighted by its gradient through all layers (Chefer et al. 2021)",
    },
    attention_gradient: { name: "Attention × gradient", says: "the last layer, each head times its gradient" },
    input_gradient: { name: "Input × gradient", says: "signed: what spoke for the answer, and what against it" },
    rollout: { name: "Attention rollout", says: "attention multiplied through the layers; the same for every answer" },
    raw_attention: { name: "Raw attention", says: "attention of the last layer; the same for every answer" },
    leave_one_out: { name: "Leave one out", says: "how much the probability falls when one word or box is taken away" },
  };

  const QUANTITIES = { strongest: "strongest weight", selected: "weight at the selection" };

  const DEFAULTS = {
    show: null, // a key of METHODS, or "attention"; null = the first that there is
    answer: null, // the text of an answer ("red", or "red#2" for the second of that name); null = the first
    versus: null, // another answer, whose scores are subtracted
    evidence: "for", // or "against"
    direction: "text_to_regions",
    cells: "all", // heads: "all", or "LAYER.HEAD", "LAYER.*", "*.HEAD" joined by commas; layers count in the direction
    how: "mean", // or "max": how several heads become one
    lines: false,
    pieces: false,
    scale: "shared", // or "view"
    light: false,
    row: null, // of models that read a row for each choice; null = that of the answer
    quantity: "strongest",
    multiples: false,
    lock: null, // {document, row, kind: "words" | "regions", index}
  };

  const MOST_FILLED = 3; // boxes that are filled and named
  const NAMED = 0.2; // of the largest value: what a box needs to be filled and named
  const MOST_HEIGHT = 32; // of a picture, in rem
  const PIXELS_SHOWN = 3; // enlargement from which a picture's pixels are not blurred
  const MOST_LINES = 40;
  const MOST_BARS = 5; // answers shown before "more"
  const ATTENTION_NOTE = "Attention is not an explanation: it shows where heads look, not what decided the answer.";
  const HEADS_HINT = "Click a head to see it on the picture; Shift adds heads.";
  const LABEL_FONT = "600 12px system-ui, sans-serif";

  // ---------------------------------------------------------------------------------------------- small tools

  /** An HTML element with properties, attributes (names with a hyphen, role) and children. */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === null || value === undefined) continue;
      if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
      else element[name] = value;
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  /** An SVG element with attributes. */
  function draw(tag, attributes = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const capitalise = (text) => text.charAt(0).toUpperCase() + text.slice(1);
  const quote = (text) => `“${text}”`;
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
  const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] ?? "th");

  /** A weight with three digits. */
  function format(value) {
    const size = Math.abs(value);
    if (size > 0 && size < 0.001) return value < 0 ? ">−0.001" : "<0.001";
    const text = size === 0 ? "0" : size.toFixed(size >= 10 ? 1 : size >= 0.1 ? 2 : 3);
    return value < 0 ? `−${text}` : text;
  }

  /** "layers.0" -> "layer 0", "co_attention_layers.1" -> "co-attention layer 1". */
  function nameLayer(name) {
    return name
      .replace("co_attention", "co-attention")
      .replace(/_?layers\b/, " layer")
      .replaceAll(".", " ")
      .trim();
  }

  const ruler = document.createElement("canvas").getContext("2d");

  /** Width of a text in pixels. */
  function measure(text, font) {
    ruler.font = font;
    return ruler.measureText(text).width;
  }

  // ---------------------------------------------------------------------------------------------- colours

  /** sRGB bytes -> OKLab (Ottosson 2020). */
  function toLab([r, g, b]) {
    const [x, y, z] = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    const l = Math.cbrt(0.4122214708 * x + 0.5363325363 * y + 0.0514459929 * z);
    const m = Math.cbrt(0.2119034982 * x + 0.6806995451 * y + 0.1073969566 * z);
    const s = Math.cbrt(0.0883024619 * x + 0.2817188376 * y + 0.6299787005 * z);
    return [
      0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
      1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
      0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
    ];
  }

  /** OKLab -> sRGB bytes. */
  function fromLab([L, a, b]) {
    const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
    const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
    const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
    return [
      4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
      -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
      -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
    ].map((v) => Math.round(255 * clamp(v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055, 0, 1)));
  }

  /** The scale of the page: from the paper to one hue for positive values and another for negative ones. */
  class Palette {
    constructor(element) {
      const style = getComputedStyle(element);
      const read = (name) => {
        const hex = style.getPropertyValue(name).trim().slice(1);
        return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
      };
      const [paper, positive, negative] = ["--vl-track", "--vl-positive", "--vl-negative"].map(read);
      const [over, under] = ["--vl-box-positive", "--vl-box-negative"].map(read);
      this.steps = { positive: this.ramp(paper, positive), negative: this.ramp(paper, negative) };
      this.strong = { positive: `rgb(${positive})`, negative: `rgb(${negative})` };
      this.boxes = { positive: `rgb(${over})`, negative: `rgb(${under})` };
    }

    ramp(start, end) {
      const [a, b] = [toLab(start), toLab(end)];
      return Array.from({ length: 256 }, (_, n) => fromLab(a.map((v, k) => v + ((b[k] - v) * n) / 255)));
    }

    /** Red, green, blue of a strength in [-1, 1]. */
    rgb(strength) {
      const steps = strength < 0 ? this.steps.negative : this.steps.positive;
      return steps[Math.round(255 * clamp(Math.abs(strength), 0, 1))];
    }

    css(strength) {
      return `rgb(${this.rgb(strength)})`;
    }

    /** The ink that is easier to read on a strength. */
    ink(strength) {
      const [r, g, b] = this.rgb(strength).map((v) =>
        v / 255 <= 0.04045 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4,
      );
      return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
    }

    hue(value) {
      return value < 0 ? this.strong.negative : this.strong.positive;
    }

    /** The hue of a box: pictures are as light in the dark theme as in the light one. */
    boxHue(value) {
      return value < 0 ? this.boxes.negative : this.boxes.positive;
    }
  }

  // ---------------------------------------------------------------------------------------------- numbers

  /** Which heads a text such as "all" or "1.3,2.*" names. */
  function readCells(text) {
    if (text === "all") return () => true;
    const parts = text.split(",").map((part) => part.split("."));
    return (layer, head) => parts.some(([l, h]) => (l === "*" || +l === layer) && (h === "*" || +h === head));
  }

  /** The numbers of one document: maps are decoded when they are first needed and combinations of heads remembered. */
  class Source {
    constructor(doc) {
      if (doc.format !== FORMAT) throw new Error(`this page reads documents of ${FORMAT}; found ${doc.format}`);
      this.doc = doc;
      this.bytes = new Map();
      this.combinations = new Map();
      this.largest = new Map();
      const seen = {};
      this.keys = doc.answers.map(({ text }) => {
        seen[text] = (seen[text] ?? 0) + 1;
        return seen[text] > 1 ? `${text}#${seen[text]}` : text;
      });
      const shown = doc.rows.map((row) => row.image.join());
      this.oneRowAtATime = doc.rows.length > 1 && new Set(shown).size === 1;
    }

    /** Number of the answer of a key; the first if there is none. */
    answer(key) {
      return Math.max(0, this.keys.indexOf(key));
    }

    get methods() {
      const found = Object.keys(METHODS).filter((method) => this.doc.relevance?.[method]);
      return this.doc.leave_one_out ? [...found, "leave_one_out"] : found;
    }

    /** Layers of a row that have maps of a direction. */
    layers(row, direction) {
      return this.doc.rows[row].attention.layers.filter((layer) => layer.directions[direction]);
    }

    get directions() {
      return Object.keys(DIRECTIONS).filter((direction) => this.layers(0, direction).length);
    }

    /** Words or, if asked for, word pieces of a row. */
    units(row, pieces) {
      return this.doc.rows[row].words.flatMap((word, number) =>
        pieces && word.tokens.length > 1
          ? word.tokens.map((token, k) => ({
              text: word.pieces[k],
              tokens: [token],
              special: word.special,
              word: number,
            }))
          : [{ text: word.text, tokens: word.tokens, special: word.special, word: number }],
      );
    }

    /** Bytes of all heads of a layer, (H, from, to). */
    decode(part) {
      let bytes = this.bytes.get(part);
      if (!bytes) {
        bytes = Uint8Array.from(atob(part.data), (c) => c.charCodeAt(0));
        this.bytes.set(part, bytes);
      }
      return bytes;
    }

    /** Mean or maximum of the chosen heads: {weights: (from * to), from, to}; of all heads if none is chosen. */
    combine(row, direction, cells, how) {
      const key = [row, direction, cells, how].join();
      const known = this.combinations.get(key);
      if (known) return known;
      const layers = this.layers(row, direction);
      if (!layers.length) return null;
      const { from, to } = layers[0].directions[direction];
      const size = from * to;
      const weights = new Float32Array(size);
      const chosen = readCells(cells);
      let count = 0;
      layers.forEach((layer, l) => {
        const part = layer.directions[direction];
        const bytes = this.decode(part);
        for (let head = 0; head < part.heads; head++) {
          if (!chosen(l, head)) continue;
          count++;
          const at = head * size;
          if (how === "max") for (let k = 0; k < size; k++) weights[k] = Math.max(weights[k], bytes[at + k]);
          else for (let k = 0; k < size; k++) weights[k] += bytes[at + k];
        }
      });
      if (!count) return this.combine(row, direction, "all", how);
      const unit = this.doc.scale / 255 / (how === "max" ? 1 : count);
      for (let k = 0; k < size; k++) weights[k] *= unit;
      const found = { weights, from, to };
      if (this.combinations.size > 64) this.combinations.clear();
      this.combinations.set(key, found);
      return found;
    }

    /** Weights of words and boxes, {words, regions}: null on a side that the view does not speak of. */
    attention(row, state, units, selection) {
      const { from, to } = DIRECTIONS[state.direction];
      const map = this.combine(row, state.direction, state.cells, state.how);
      const values = { words: null, regions: null };
      if (!map) return values;
      const groups = {
        words: units.map((unit) => unit.tokens),
        regions: this.doc.rows[row].regions.map((_, n) => [n]),
      };
      const special = {
        words: units.map((unit) => unit.special),
        regions: this.doc.rows[row].regions.map((region) => region.special),
      };
      const backwards = selection && selection.kind === to && from !== to;
      if (backwards) {
        const columns = groups[to][selection.index];
        values[from] = groups[from].map(
          (rows) => sum(rows, (m) => sum(columns, (n) => map.weights[m * map.to + n])) / rows.length,
        );
        return values;
      }
      const rows =
        selection && selection.kind === from
          ? groups[from][selection.index]
          : groups[from].flatMap((tokens, n) => (special[from][n] ? [] : tokens));
      values[to] = groups[to].map((columns) =>
        rows.length ? sum(rows, (m) => sum(columns, (n) => map.weights[m * map.to + n])) / rows.length : 0,
      );
      return values;
    }

    /** Scores of words and boxes for an answer. */
    scores(row, state, units) {
      const answer = this.answer(state.answer);
      const one = this.scoresOf(row, state.show, answer, units, state.evidence);
      if (state.versus === null || this.keys.indexOf(state.versus) < 0) return one;
      const other = this.scoresOf(row, state.show, this.answer(state.versus), units, state.evidence);
      const minus = (a, b) => a && b && a.map((v, k) => v - b[k]);
      return { words: minus(one.words, other.words), regions: minus(one.regions, other.regions) };
    }

    scoresOf(row, method, answer, units, evidence) {
      if (method === "leave_one_out") {
        const { values, rows } = this.doc.leave_one_out;
        const fall = (changed) => (changed ? values[answer] - changed.values[answer] : 0);
        return { words: units.map((unit) => fall(rows[row].words[unit.word])), regions: rows[row].regions.map(fall) };
      }
      const against = method === "relevance" && evidence === "against" && this.doc.against?.length;
      const found = (against ? this.doc.against : this.doc.relevance[method])?.[answer]?.[row];
      if (!found) return { words: null, regions: null };
      const sign = against ? -1 : 1;
      return {
        words: units.map((unit) => sign * sum(unit.tokens, (token) => found.words_tokens[token])),
        regions: found.regions.map((value) => sign * value),
      };
    }

    /** Largest size of what is no special token, over all rows, of a method's scores for an answer. The scores of
     *  another answer would not do: those of one that is nearly certain are a hundredth of the others'. */
    reach(method, answer, evidence) {
      const key = `${method} ${answer} ${evidence}`;
      if (!this.largest.has(key)) {
        const sizes = this.doc.rows.map((row, number) => {
          const units = this.units(number, false);
          return largest(this.scoresOf(number, method, answer, units, evidence), units, row.regions);
        });
        this.largest.set(key, Math.max(...sizes));
      }
      return this.largest.get(key);
    }
  }

  /** Sum of a function over some numbers. */
  function sum(numbers, value) {
    let total = 0;
    for (const number of numbers) total += value(number);
    return total;
  }

  /** Largest size among the values of words and boxes that are not special. */
  function largest(values, units, regions) {
    let most = 0;
    values.words?.forEach((value, n) => units[n].special || (most = Math.max(most, Math.abs(value))));
    values.regions?.forEach((value, n) => regions[n].special || (most = Math.max(most, Math.abs(value))));
    return most;
  }

  /** Numbers of the largest values that are above zero in size, largest first. */
  function rank(values, skip = () => false) {
    return values
      .map((value, n) => [Math.abs(value), n])
      .filter(([value, n]) => value > 0 && !skip(n))
      .sort((a, b) => b[0] - a[0])
      .map(([, n]) => n);
  }

  // ---------------------------------------------------------------------------------------------- menus

  /** Controls that are bound to one field of the state each. */
  class Menus {
    constructor(controller) {
      this.controller = controller;
      this.bound = [];
    }

    /** Remember how to bring a control up to date. */
    bind(element, update, visible = () => true) {
      this.bound.push((state) => {
        element.hidden = !visible(state);
        update(state);
      });
      return element;
    }

    choose(name, label, options, visible) {
      const select = make(
        "select",
        {},
        ...options.map(([value, text]) => make("option", { value, textContent: text })),
      );
      select.addEventListener("change", () => {
        const value = select.value === "" ? null : name === "row" ? +select.value : select.value;
        this.controller.set({ [name]: value });
      });
      const field = make("label", { className: "vl-field" }, make("span", { textContent: label }), select);
      return this.bind(field, (state) => (select.value = state[name] ?? ""), visible);
    }

    segments(name, label, options, visible) {
      const buttons = options.map(([value, text, says]) =>
        make("button", {
          type: "button",
          textContent: text,
          title: says ?? "",
          onclick: () => this.controller.set({ [name]: value }),
        }),
      );
      const group = make("div", { className: "vl-segments", role: "group", "aria-label": label }, ...buttons);
      const field = make("div", { className: "vl-field" }, make("span", { textContent: label }), group);
      const update = (state) =>
        buttons.forEach((button, n) => button.setAttribute("aria-pressed", state[name] === options[n][0]));
      return this.bind(field, update, visible);
    }

    check(name, label, visible) {
      const box = make("input", { type: "checkbox", onchange: () => this.controller.set({ [name]: box.checked }) });
      const field = make("label", { className: "vl-check" }, box, label);
      return this.bind(field, (state) => (box.checked = state[name]), visible);
    }

    /** The layer (place 0) or the head (place 1) of the cells that are shown. */
    chooseCells(label, place, visible) {
      const select = make("select", {});
      select.addEventListener("change", () => {
        const parts = this.cellParts();
        parts[place] = select.value;
        this.controller.set({ cells: parts.every((part) => part === "*") ? "all" : parts.join(".") });
      });
      const field = make("label", { className: "vl-field" }, make("span", { textContent: label }), select);
      const update = (state) => {
        const layers = this.controller.sources[0].layers(0, state.direction);
        const names = place
          ? range(Math.max(0, ...layers.map((layer) => layer.directions[state.direction].heads)))
          : layers.map((layer) => nameLayer(layer.name));
        const key = names.join();
        if (key !== select.dataset.names) {
          select.replaceChildren(
            make("option", { value: "*", textContent: "all" }),
            ...names.map((name, n) => make("option", { value: String(n), textContent: name })),
          );
          select.dataset.names = key;
        }
        select.value = this.cellParts()[place];
      };
      return this.bind(field, update, visible);
    }

    cellParts() {
      const { cells } = this.controller.state;
      return cells === "all" || cells.includes(",") ? ["*", "*"] : cells.split(".");
    }

    paint(state) {
      for (const update of this.bound) update(state);
    }
  }

  const range = (count) => Array.from({ length: count }, (_, n) => n);

  // ---------------------------------------------------------------------------------------------- the picture

  /** An image with the boxes of one row on it, drawn in pixels of the screen, so that outlines and labels keep their
   * size when the picture shrinks. */
  class Picture {
    constructor(block, number) {
      this.block = block;
      this.image = block.source.doc.images[number];
      this.number = number;
      this.boxes = block.row.regions
        .map((region, index) => ({ ...region, index }))
        .filter((region) => region.box && region.image === number)
        .sort((a, b) => area(b.box) - area(a.box)); // small boxes lie on top of large ones
      this.svg = draw("svg", { class: "vl-picture", role: "img" });
      this.photo = draw("image", { href: this.image.src, preserveAspectRatio: "none" });
      this.shade = draw("g", { class: "vl-shade" });
      this.shapes = draw("g");
      this.labels = draw("g", { class: "vl-labels" });
      this.svg.append(this.photo, this.shade, this.shapes, this.labels);
      for (const box of this.boxes) {
        box.halo = draw("rect", { class: "vl-halo" });
        box.outline = draw("rect", { class: "vl-box" });
        box.hit = draw("rect", { class: "vl-hit", "data-kind": "regions", "data-index": box.index });
        this.shapes.append(box.halo, box.outline);
      }
      this.shapes.append(...this.boxes.map((box) => box.hit));
      this.element = make("figure", { className: "vl-figure" }, this.svg);
      const ratio = this.image.width / this.image.height;
      this.element.style.aspectRatio = ratio;
      this.element.style.maxWidth = `${(MOST_HEIGHT * ratio).toFixed(2)}rem`;
      this.observer = new ResizeObserver(() => this.layOut());
      this.observer.observe(this.element);
    }

    /** Fit everything to the width on the screen. */
    layOut() {
      const width = this.element.clientWidth;
      if (!width || width === this.width) return;
      this.width = width;
      this.zoom = width / this.image.width;
      this.height = this.image.height * this.zoom;
      this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
      putAt(this.photo, [0, 0, width, this.height]);
      for (const box of this.boxes) {
        box.at = box.box.map((corner) => corner * this.zoom);
        for (const shape of [box.halo, box.outline, box.hit]) putAt(shape, box.at);
      }
      this.photo.style.imageRendering = this.zoom >= PIXELS_SHOWN ? "pixelated" : "auto";
      if (this.last) this.paint(...this.last);
      this.block.paintLines();
    }

    /** Show weights; `look` says how strong each is, which boxes are emphasised and what the answer points at. */
    paint(values, look) {
      this.last = [values, look];
      if (!this.width) return;
      const order = values ? rank(values, (n) => this.block.row.regions[n].special) : [];
      const strongest = order
        .slice(0, MOST_FILLED)
        .filter((n) => Math.abs(values[n]) >= NAMED * Math.abs(values[order[0]]));
      const filled = new Set(strongest);
      for (const box of this.boxes) {
        const value = values ? values[box.index] : 0;
        const strength = clamp(Math.abs(value) / look.scale, 0, 1);
        const active = look.active.has(box.index);
        const style = this.style(value, strength, active, filled.has(box.index), box.special);
        if (look.crossed.has(box.index)) style.dash = "3 4";
        set(box.outline, {
          stroke: style.stroke,
          "stroke-width": style.width,
          "stroke-opacity": style.opacity,
          "stroke-dasharray": style.dash ?? (box.special ? "6 4" : "none"),
          fill: style.stroke,
          "fill-opacity": look.light ? 0 : style.fill,
        });
        set(box.halo, { "stroke-width": style.width + 2, "stroke-opacity": 0.25 + 0.5 * style.opacity });
        box.halo.style.display = box.outline.style.display = box.special && !active && strength < 0.02 ? "none" : "";
      }
      this.paintLabels(values, look, strongest);
      this.paintShade(values, look);
      this.svg.setAttribute("aria-label", this.describe(values, order));
    }

    style(value, strength, active, filled, special) {
      const { palette } = this.block.view;
      return {
        stroke: palette.boxHue(value),
        width: active ? 4 : special ? 1.5 : 1 + 3 * strength,
        opacity: active ? 1 : 0.35 + 0.65 * strength,
        fill: active ? 0.3 : filled && strength > 0 ? 0.1 + 0.25 * strength : 0,
      };
    }

    /** Names on the strongest and the emphasised boxes, each where it hides the least. */
    paintLabels(values, look, strongest) {
      const named = [...look.active, ...strongest.filter((n) => !look.active.has(n))];
      const placed = [];
      const labels = [];
      for (const index of named) {
        const box = this.boxes.find((one) => one.index === index);
        if (!box) continue;
        const number = values ? ` ${format(values[index])}` : "";
        const label = this.fitLabel(box.name, number, this.width - 4);
        const spot = this.findSpot(box.at, label.width, 19, placed);
        if (!spot) continue;
        placed.push(spot);
        const fill = this.block.view.palette.boxHue(values ? values[index] : 0);
        labels.push(
          draw("rect", { x: spot[0], y: spot[1], width: label.width, height: 19, rx: 4, fill }),
          draw("text", { x: spot[0] + 6, y: spot[1] + 13.5, fill: "#ffffff" }, label.text),
        );
      }
      for (const { box, name } of look.marks.filter((mark) => mark.image === this.number)) {
        const [x1, y1, x2, y2] = box.map((corner) => corner * this.zoom);
        labels.unshift(
          draw("rect", {
            class: `vl-mark vl-mark-${name}`,
            x: x1 - 3,
            y: y1 - 3,
            width: x2 - x1 + 6,
            height: y2 - y1 + 6,
            rx: 3,
          }),
        );
      }
      this.labels.replaceChildren(...labels);
    }

    /** A name and its number, the name shortened until both fit. */
    fitLabel(name, number, room) {
      let text = name + number;
      for (let length = name.length; measure(text, LABEL_FONT) + 12 > Math.min(room, 260) && length > 3; length--)
        text = `${name.slice(0, length - 1).trimEnd()}…${number}`;
      return { text, width: Math.ceil(measure(text, LABEL_FONT)) + 12 };
    }

    /** The corner next to a box at which a label hides least of other labels; null if it would hide much of one. */
    findSpot([x1, y1, x2, y2], width, height, placed) {
      const corners = [
        [x1, y1 - height],
        [x1, y2],
        [x2 - width, y1 - height],
        [x2 - width, y2],
        [x1, y1],
        [x2, y1],
        [x1 - width, y1],
        [x2, y2 - height],
        [x1 - width, y2 - height],
        [x1, y2 - height],
      ];
      let best = null;
      let least = 0.4;
      for (const [x, y] of corners) {
        const left = clamp(x, 0, Math.max(0, this.width - width));
        const top = clamp(y, 0, Math.max(0, this.height - height));
        const spot = [left, top, left + width, top + height];
        const hidden = sum(placed, (other) => overlap(spot, other)) / (width * height);
        const moved = (Math.abs(left - x) + Math.abs(top - y)) / 1000;
        if (hidden + moved < least) [best, least] = [spot, hidden + moved];
      }
      return best;
    }

    /** In the light mode, darkness over everything that has little weight. */
    paintShade(values, look) {
      if (!look.light || !values) return this.shade.replaceChildren();
      const id = `vl-light-${this.block.view.id}-${this.block.number}-${this.number}`;
      const holes = this.boxes
        .filter((box) => !box.special)
        .map((box) => {
          const strength = clamp(Math.max(0, values[box.index]) / look.scale, 0, 1);
          const hole = draw("rect", { fill: "#000", "fill-opacity": strength });
          putAt(hole, box.at);
          return hole;
        });
      const everything = [0, 0, this.width, this.height];
      const ground = draw("rect", { fill: "#fff" });
      const dark = draw("rect", { fill: "#000", "fill-opacity": 0.72, mask: `url(#${id})` });
      putAt(ground, everything);
      putAt(dark, everything);
      this.shade.replaceChildren(draw("mask", { id, maskUnits: "userSpaceOnUse" }, ground, ...holes), dark);
    }

    describe(values, order) {
      const names = order.slice(0, MOST_FILLED).map((n) => `${this.block.row.regions[n].name} ${format(values[n])}`);
      const what = `Picture with ${this.boxes.length} boxes`;
      return names.length ? `${what}; strongest: ${names.join(", ")}` : what;
    }

    /** The middle of a box, in pixels of the screen from the picture's corner; null if it is in another picture. */
    middle(index) {
      const box = this.boxes.find((one) => one.index === index);
      return box?.at ? [(box.at[0] + box.at[2]) / 2, (box.at[1] + box.at[3]) / 2] : null;
    }
  }

  /** A line between two points that leaves each towards another point, as strong as its weight. */
  function drawCurve(a, b, strength, look) {
    return draw("path", {
      d: `M${a.at} C${a.towards} ${b.towards} ${b.at}`,
      fill: "none",
      "stroke-width": 1 + 3 * strength,
      "stroke-opacity": 0.15 + 0.85 * strength,
      ...look,
    });
  }

  const area = ([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);

  function overlap(a, b) {
    const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
    const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
    return Math.max(0, width) * Math.max(0, height);
  }

  function putAt(shape, [x1, y1, x2, y2]) {
    set(shape, { x: x1, y: y1, width: Math.max(x2 - x1, 1), height: Math.max(y2 - y1, 1) });
  }

  function set(shape, attributes) {
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  }

  // ---------------------------------------------------------------------------------------------- words and boxes

  /** A row of the model's input: its pictures, its words, and its boxes as a sorted list. */
  class Block {
    constructor(view, number) {
      this.view = view;
      this.controller = view.controller;
      this.source = view.source;
      this.number = number;
      this.row = this.source.doc.rows[number];
      this.units = this.source.units(number, this.controller.state.pieces);
      this.pictures = this.row.image.map((image) => new Picture(this, image));
      this.lines = draw("svg", { class: "vl-lines", "aria-hidden": "true" });
      this.element = make(
        "section",
        { className: "vl-block", "data-row": number },
        make(
          "div",
          { className: "vl-pictures" },
          ...(this.pictures.length ? this.pictures.map((p) => p.element) : [this.explainNoPicture()]),
        ),
        make("div", { className: "vl-side" }, this.buildWords(), this.buildList()),
        this.lines,
      );
    }

    explainNoPicture() {
      const blind = !this.source.doc.images.length;
      const text = blind
        ? "This run reads the words alone: there is no picture side."
        : "The detector found no region.";
      const image = this.source.doc.images[0];
      return make(
        "div",
        { className: "vl-none" },
        image ? make("img", { src: image.src, alt: "The picture, without regions" }) : null,
        make("p", { textContent: text }),
      );
    }

    buildWords() {
      this.words = this.units.map((unit, index) =>
        make(
          "button",
          {
            type: "button",
            className: unit.special ? "vl-word vl-special" : "vl-word",
            "data-kind": "words",
            "data-index": index,
            tabIndex: -1,
          },
          make("span", { textContent: unit.text }),
          make("small", {}),
        ),
      );
      const plain = this.words.filter((_, n) => !this.units[n].special);
      const apart = this.words.filter((_, n) => this.units[n].special);
      (plain[0] ?? apart[0]).tabIndex = 0;
      const label = this.row.label ? make("h4", { className: "vl-row-label", textContent: this.row.label }) : null;
      return make(
        "div",
        { className: "vl-words", role: "group", "aria-label": "Words" },
        label,
        make("div", { className: "vl-sentence" }, ...plain),
        apart.length ? make("div", { className: "vl-apart" }, make("span", { textContent: "apart" }), ...apart) : null,
      );
    }

    buildList() {
      this.items = this.row.regions.map((region, index) => {
        const bar = make("span", { className: "vl-bar" }, make("i", {}));
        return make(
          "button",
          {
            type: "button",
            className: region.special ? "vl-item vl-special" : "vl-item",
            "data-kind": "regions",
            "data-index": index,
            tabIndex: -1,
          },
          make("span", { className: "vl-name", textContent: region.name }),
          bar,
          make("span", { className: "vl-number" }),
        );
      });
      if (this.items.length) this.items[0].tabIndex = 0;
      this.list = make(
        "div",
        { className: "vl-list", role: "group", "aria-label": "Boxes, strongest first" },
        ...this.items,
      );
      return this.list;
    }

    /** What the state shows of this row for a selection: {values: {words, regions}, scale}. */
    compute(selection) {
      const { state } = this.controller;
      const values =
        state.show === "attention"
          ? this.source.attention(this.number, state, this.units, selection)
          : this.source.scores(this.number, state, this.units);
      return { values, scale: this.controller.scale(this, values) };
    }

    paint(selection) {
      const { values, scale } = this.compute(selection);
      const active = { words: new Set(), regions: new Set() };
      if (selection) active[selection.kind].add(selection.index);
      this.paintWords(values.words, scale, active.words);
      this.paintList(values.regions, scale, active.regions);
      const look = {
        scale,
        active: active.regions,
        light: this.controller.state.light,
        crossed: this.view.crossed(this.number, "regions"),
        marks: this.view.marks(),
      };
      for (const picture of this.pictures) picture.paint(values.regions, look);
      this.last = { selection, scale };
      this.paintLines();
      return { values, scale };
    }

    paintWords(values, scale, active) {
      const locked = this.view.lockedIndex(this.number, "words");
      const crossed = this.view.crossed(this.number, "words");
      this.words.forEach((element, n) => {
        const strength = values ? values[n] / scale : 0;
        element.style.backgroundColor = this.view.palette.css(strength);
        element.style.color = this.view.palette.ink(strength);
        element.classList.toggle("vl-active", active.has(n));
        element.classList.toggle("vl-crossed", crossed.has(this.units[n].word));
        element.setAttribute("aria-pressed", n === locked);
        const number = values ? format(values[n]) : "";
        element.lastChild.textContent = number;
        element.setAttribute("aria-label", number ? `${this.units[n].text}, ${number}` : this.units[n].text);
      });
    }

    paintList(values, scale, active) {
      const locked = this.view.lockedIndex(this.number, "regions");
      const crossed = this.view.crossed(this.number, "regions");
      this.items.forEach((element, n) => {
        const value = values ? values[n] : 0;
        const fill = element.children[1].firstChild;
        fill.style.width = `${100 * clamp(Math.abs(value) / scale, 0, 1)}%`;
        fill.style.backgroundColor = this.view.palette.hue(value);
        element.lastChild.textContent = values ? format(value) : "";
        element.classList.toggle("vl-active", active.has(n));
        element.classList.toggle("vl-crossed", crossed.has(n));
        element.setAttribute("aria-pressed", n === locked);
      });
      // Rows do not move under the pointer or away from the keyboard's focus.
      if (!values || this.list.matches(":hover") || this.list.contains(document.activeElement)) return;
      const order = this.sort(values);
      if (order.some((n, place) => this.list.children[place] !== this.items[n])) {
        this.list.replaceChildren(...order.map((n) => this.items[n]));
        this.items.forEach((item, n) => (item.tabIndex = n === order[0] ? 0 : -1));
      }
    }

    /** Regions by value, what is no detected region behind them. */
    sort(values) {
      const { regions } = this.row;
      return values
        .map((_, n) => n)
        .sort((a, b) => regions[a].special - regions[b].special || values[b] - values[a] || a - b);
    }

    /** The chosen heads as lines: of what is selected, or the strongest of all. */
    paintLines() {
      const { state } = this.controller;
      const { selection, scale } = this.last ?? {};
      if (!this.last || !state.lines || state.show !== "attention") return this.lines.replaceChildren();
      const frame = this.element.getBoundingClientRect();
      const { from, to } = DIRECTIONS[state.direction];
      const links = this.links(selection).slice(0, MOST_LINES);
      const paths = [];
      for (const { start, end, weight } of links) {
        const a = this.anchor(from, start, frame, from === to);
        const b = this.anchor(to, end, frame, from === to);
        if (!a || !b) continue;
        const strength = clamp(weight / scale, 0, 1);
        const hue = this.view.palette.boxHue(1);
        paths.push(drawCurve(a, b, strength, { class: "vl-line-halo" }), drawCurve(a, b, strength, { stroke: hue }));
      }
      return this.lines.replaceChildren(...paths);
    }

    /** Pairs of units that the chosen heads link, strongest first. */
    links(selection) {
      const { state } = this.controller;
      const { from, to } = DIRECTIONS[state.direction];
      const map = this.source.combine(this.number, state.direction, state.cells, state.how);
      if (!map) return [];
      const groups = { words: this.units.map((unit) => unit.tokens), regions: this.row.regions.map((_, n) => [n]) };
      const special = { words: this.units, regions: this.row.regions };
      const found = [];
      groups[from].forEach((rows, start) => {
        groups[to].forEach((columns, end) => {
          const chosen = selection
            ? (selection.kind === from && selection.index === start) ||
              (selection.kind === to && from !== to && selection.index === end)
            : !special[from][start].special && !special[to][end].special;
          if (!chosen || (from === to && start === end)) return;
          found.push({
            start,
            end,
            weight: sum(rows, (m) => sum(columns, (n) => map.weights[m * map.to + n])) / rows.length,
          });
        });
      });
      return found.filter(({ weight }) => weight > 0).sort((a, b) => b.weight - a.weight);
    }

    /** Where a line starts or ends, from the corner of this block, and the point towards which it leaves: words are
     * left towards the picture, and both ends of a line among words or boxes upwards. */
    anchor(kind, index, frame, within) {
      if (kind === "words") {
        const box = this.words[index].getBoundingClientRect();
        const x = box.left + box.width / 2 - frame.left;
        const picture = this.pictures[0]?.element.getBoundingClientRect();
        const up = within || (picture && picture.bottom <= box.top);
        const y = (up ? box.top : box.bottom) - frame.top;
        return { at: [x, y], towards: [x, y + (up ? -40 : 40)] };
      }
      for (const picture of this.pictures) {
        const middle = picture.middle(index);
        if (!middle) continue;
        const corner = picture.svg.getBoundingClientRect();
        const [x, y] = [corner.left - frame.left + middle[0], corner.top - frame.top + middle[1]];
        return { at: [x, y], towards: [x, y + (within ? -40 : 0)] };
      }
      return null;
    }

    nameOf(kind, index) {
      return kind === "words" ? this.units[index].text : this.row.regions[index].name;
    }

    destroy() {
      for (const picture of this.pictures) picture.observer.disconnect();
    }
  }

  // ---------------------------------------------------------------------------------------------- answers

  /** The answers as bars; the chosen one is explained, and beside each stands what it becomes without the selection. */
  class Answers {
    constructor(view) {
      this.view = view;
      this.source = view.source;
      const { answers } = this.source.doc;
      this.bars = answers.map((answer, n) => this.buildBar(answer, n));
      this.list = make("div", { className: "vl-answers", role: "group", "aria-label": this.title }, ...this.bars);
      this.more = make("button", { type: "button", className: "vl-more", onclick: () => this.toggleMore() });
      this.without = make("p", { className: "vl-without" });
      this.element = make(
        "section",
        { className: "vl-answer-part" },
        this.list,
        answers.length > MOST_BARS ? this.more : null,
        this.without,
      );
      this.open = true;
      this.toggleMore();
    }

    get title() {
      return this.source.doc.answers_are === "phrases" ? "Phrases, with the probability of their best box" : "Answers";
    }

    buildBar(answer, n) {
      const sure = answer.probability;
      const signs = { true: "✓", false: "✗" };
      const bar = make(
        "button",
        { type: "button", className: "vl-answer", title: "Show what this answer rests on", "data-answer": n },
        make(
          "span",
          { className: "vl-name" },
          answer.text,
          make("b", { className: `vl-truth-${answer.truth}`, textContent: signs[answer.truth] ?? "" }),
        ),
        make("span", { className: "vl-bar" }, make("i", {}), make("em", {})),
        make("span", { className: "vl-number", textContent: percent(sure) }),
      );
      bar.children[1].firstChild.style.width = `${100 * clamp(sure, 0, 1)}%`;
      return bar;
    }

    toggleMore() {
      this.open = !this.open;
      const hidden = this.bars.length - MOST_BARS;
      this.bars.forEach((bar, n) => (bar.hidden = !this.open && n >= MOST_BARS));
      this.more.textContent = this.open ? "fewer" : `${hidden} more`;
      this.more.setAttribute("aria-expanded", this.open);
    }

    paint(selection) {
      const { state } = this.view.controller;
      const { doc } = this.source;
      const chosen = this.source.answer(state.answer);
      const versus = state.versus === null ? -1 : this.source.keys.indexOf(state.versus);
      if (Math.max(chosen, versus) >= MOST_BARS && !this.open) this.toggleMore();
      const before = this.view.before;
      this.bars.forEach((bar, n) => {
        bar.classList.toggle("vl-chosen", n === chosen);
        bar.classList.toggle("vl-versus", n === versus);
        bar.setAttribute("aria-pressed", n === chosen);
        const mark = bar.children[1].lastChild;
        const old = before
          ? (before.answers.find((answer) => answer.text === doc.answers[n].text)?.probability ?? 0)
          : null;
        const changed = selection ? this.changed(selection) : null;
        const share = changed ? changed.values[n] : old;
        mark.hidden = share === null;
        if (share !== null) mark.style.left = `${100 * clamp(share, 0, 1)}%`;
      });
      this.without.textContent = this.explain(selection);
    }

    /** What becomes of the first answer without what is selected; null where that is not known. */
    changed({ row, kind, index }) {
      const known = this.source.doc.leave_one_out?.rows[row];
      if (!known) return null;
      return kind === "regions" ? known.regions[index] : known.words[this.view.block(row).units[index].word];
    }

    explain(selection) {
      const { doc } = this.source;
      if (!selection || !doc.leave_one_out) return "\u00a0";
      const name = this.view.block(selection.row).nameOf(selection.kind, selection.index);
      const changed = this.changed(selection);
      if (!changed) return `${quote(name)} always stays.`;
      const chosen = this.source.answer(this.view.controller.state.answer);
      const same = changed.answer === doc.answers[0].text || doc.answers_are === "phrases";
      const [from, to] = [doc.leave_one_out.values[chosen], changed.values[chosen]].map(percent);
      const now = same ? "" : `; the answer becomes ${quote(changed.answer)}`;
      return `Without ${quote(name)}: ${doc.answers[chosen].text} ${from} → ${to}${now}`;
    }
  }

  // ---------------------------------------------------------------------------------------------- heads

  /** The model as a map: layers by heads, coloured by a quantity or drawn as thumbnails; a click shows that head. */
  class HeadMap {
    constructor(view) {
      this.view = view;
      this.source = view.source;
      this.controller = view.controller;
      this.known = new Map(); // map of a layer -> strongest weight of each head
      this.table = make("table", { className: "vl-heads" });
      this.about = make("p", { className: "vl-small" });
      this.menus = new Menus(view.controller);
      const quantities = this.quantities().map((name) => [name, QUANTITIES[name] ?? name.replaceAll("_", " ")]);
      this.element = make(
        "section",
        { className: "vl-panel" },
        make("h3", { textContent: "Heads" }),
        make(
          "div",
          { className: "vl-menus" },
          this.menus.choose("quantity", "Colour", quantities),
          this.menus.check("multiples", "thumbnails of every head"),
        ),
        make("div", { className: "vl-wide" }, this.table),
        this.about,
      );
      this.table.addEventListener("click", (event) => {
        const cell = event.target.closest("button[data-cells]");
        if (cell) this.choose(cell.dataset.cells, event.shiftKey || event.ctrlKey || event.metaKey);
      });
      this.table.addEventListener("keydown", (event) => this.move(event));
    }

    /** Show heads alone, or (with Shift) in addition to those that are shown. */
    choose(cells, add) {
      const { state } = this.controller;
      const now = state.show === "attention" && state.cells !== "all" ? state.cells.split(",") : [];
      const joined = now.includes(cells) ? now.filter((one) => one !== cells) : [...now, cells];
      this.controller.set({ show: "attention", cells: add && cells !== "all" ? joined.join(",") || "all" : cells });
    }

    /** What heads can be coloured by: what the page computes, and what the document has. */
    quantities() {
      const given = this.source.doc.rows.flatMap((row) => Object.keys(row.statistics ?? {}));
      return [...Object.keys(QUANTITIES), ...new Set(given)];
    }

    paint(row, selection) {
      const { state } = this.controller;
      this.menus.paint(state);
      const layers = this.source.layers(row, state.direction);
      const look = [row, state.direction, state.multiples, this.controller.theme].join();
      const key = [
        look,
        state.show,
        state.cells,
        state.quantity,
        state.quantity === "selected" && JSON.stringify(selection),
      ].join();
      if (key === this.painted) return;
      this.painted = key;
      if (look !== this.built) this.build(row, layers);
      this.built = look;
      const values = this.measure(row, layers, selection);
      const most = Math.max(...values.flat(), 1e-9);
      const chosen = readCells(state.cells);
      const { palette } = this.view;
      layers.forEach((layer, l) => {
        const cells = this.cells[l];
        const mean = sum(values[l], (value) => value) / values[l].length;
        [...values[l], mean].forEach((value, head) => {
          const cell = cells[head];
          const isMean = head === values[l].length;
          if (!state.multiples || isMean) {
            cell.style.backgroundColor = palette.css(value / most);
            cell.style.color = palette.ink(value / most);
            cell.textContent = value >= 10 ? value.toFixed(0) : value.toFixed(2).replace(/^0/, "");
          }
          const name = isMean ? `${nameLayer(layer.name)}, all heads` : `${nameLayer(layer.name)}, head ${head}`;
          cell.title = `${name}: ${format(value)}`;
          cell.setAttribute("aria-label", cell.title);
          const on = state.show === "attention" && state.cells !== "all" && !isMean && chosen(l, head);
          cell.setAttribute("aria-pressed", on);
        });
      });
      const what = QUANTITIES[state.quantity] ?? state.quantity;
      this.about.textContent = layers.length
        ? `${DIRECTIONS[state.direction].label}. Colour: ${what}, 0 to ${format(most)}. ${HEADS_HINT}`
        : `This model has no maps of ${DIRECTIONS[state.direction].label}.`;
    }

    build(row, layers) {
      this.cells = [];
      const { direction, multiples } = this.controller.state;
      const heads = Math.max(0, ...layers.map((layer) => layer.directions[direction].heads));
      const button = (cells, text) =>
        make("button", { type: "button", className: "vl-cell", "data-cells": cells, textContent: text, tabIndex: -1 });
      const head = make("tr", {}, make("th", {}, button("all", "all")));
      for (let h = 0; h < heads; h++) head.append(make("th", { scope: "col" }, button(`*.${h}`, `${h}`)));
      head.append(make("th", { scope: "col", textContent: "mean" }));
      const rows = layers.map((layer, l) => {
        const part = layer.directions[direction];
        const cells = Array.from({ length: part.heads }, (_, h) => {
          const cell = button(`${l}.${h}`, "");
          if (multiples) cell.append(this.drawThumbnail(part, h));
          return cell;
        });
        cells.push(button(`${l}.*`, ""));
        this.cells.push(cells);
        const name = make("th", { scope: "row" }, button(`${l}.*`, nameLayer(layer.name)));
        return make("tr", {}, name, ...cells.map((cell) => make("td", {}, cell)));
      });
      this.table.classList.toggle("vl-multiples", multiples);
      this.table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
      const first = this.cells[0]?.[0];
      if (first) first.tabIndex = 0;
    }

    /** The map of a head, a pixel for each pair. */
    drawThumbnail(part, head) {
      const canvas = make("canvas", { width: part.to, height: part.from });
      const context = canvas.getContext("2d");
      const pixels = context.createImageData(part.to, part.from);
      const bytes = this.source.decode(part);
      const size = part.from * part.to;
      for (let k = 0; k < size; k++) {
        pixels.data.set(this.view.palette.rgb(bytes[head * size + k] / 255), 4 * k);
        pixels.data[4 * k + 3] = 255;
      }
      context.putImageData(pixels, 0, 0);
      return canvas;
    }

    /** The quantity of each head, by layer. */
    measure(row, layers, selection) {
      const { direction, quantity } = this.controller.state;
      const given = this.source.doc.rows[row].statistics?.[quantity]?.[direction];
      return layers.map((layer) => {
        const part = layer.directions[direction];
        return Array.from({ length: part.heads }, (_, h) => {
          if (given) return given[layer.name]?.[h] ?? 0;
          return quantity === "selected" ? this.weightAt(row, part, h, selection) : this.strongest(row, part, h);
        });
      });
    }

    /** Largest weight of a head between what is not special. */
    strongest(row, part, head) {
      if (!this.known.has(part)) this.known.set(part, []);
      return (this.known.get(part)[head] ??= this.largestOf(row, part, head, () => true));
    }

    /** Largest weight of a head from, or to, what is selected. */
    weightAt(row, part, head, selection) {
      if (!selection || selection.row !== row) return 0;
      const { from, to } = DIRECTIONS[this.controller.state.direction];
      const tokens =
        selection.kind === "words" ? this.view.block(row).units[selection.index].tokens : [selection.index];
      const inside = (m, n) =>
        (selection.kind === from && tokens.includes(m)) || (from !== to && selection.kind === to && tokens.includes(n));
      return this.largestOf(row, part, head, inside);
    }

    largestOf(row, part, head, inside) {
      const { from, to } = DIRECTIONS[this.controller.state.direction];
      const special = {
        words: specialTokens(this.source.doc.rows[row]),
        regions: this.source.doc.rows[row].regions.map((one) => one.special),
      };
      const bytes = this.source.decode(part);
      let most = 0;
      for (let m = 0; m < part.from; m++) {
        if (special[from][m]) continue;
        for (let n = 0; n < part.to; n++) {
          const byte = bytes[(head * part.from + m) * part.to + n];
          if (byte > most && !special[to][n] && inside(m, n)) most = byte;
        }
      }
      return (most / 255) * this.source.doc.scale;
    }

    /** Arrow keys walk over the cells. */
    move(event) {
      const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!steps) return;
      const rows = [...this.table.rows].map((row) => [...row.querySelectorAll("button")]);
      const y = rows.findIndex((cells) => cells.includes(event.target));
      const x = rows[y]?.indexOf(event.target) ?? -1;
      const next = rows[clamp(y + steps[0], 0, rows.length - 1)]?.[Math.max(0, x + steps[1])];
      if (next) {
        event.target.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        event.preventDefault();
      }
    }
  }

  /** Whether each token of a row is special. */
  function specialTokens(row) {
    const special = [];
    for (const word of row.words) for (const token of word.tokens) special[token] = word.special;
    return special;
  }

  // ---------------------------------------------------------------------------------------------- the truth meter

  /** Removal curves of the first answer: whether what is highlighted matters. */
  class Truth {
    constructor(view) {
      this.view = view;
      this.removal = view.source.doc.removal;
      this.chart = make("div", { className: "vl-charts" });
      this.about = make("p", { className: "vl-small" });
      this.element = make(
        "section",
        { className: "vl-panel" },
        make("h3", { textContent: "Does it matter? Parts taken away" }),
        this.chart,
        this.about,
      );
      this.element.hidden = !this.removal;
    }

    /** The curve of a part, method and order. */
    find(part, method, order) {
      return this.removal?.curves.find(
        (curve) => curve.part === part && curve.method === method && curve.order === order,
      );
    }

    /** Areas of the shown method with the baselines, in words; "" where there is no curve. */
    sentence(method) {
      if (!this.removal) return "";
      const part = this.find("regions", method, "most_first") ? "regions" : "text";
      const areas = [method, "relevance", "raw_attention"]
        .filter((name, n, all) => all.indexOf(name) === n)
        .map((name) => [METHODS[name].name.toLowerCase(), this.find(part, name, "most_first")])
        .concat([["random", this.find(part, "random", "random")]])
        .filter(([, curve]) => curve)
        .map(([name, curve]) => `${name} ${curve.area.toFixed(2)}`);
      const what = part === "regions" ? "boxes" : "words";
      return areas.length
        ? `Removal of the strongest ${what} first, area under the curve (lower is better): ${areas.join(", ")}.`
        : "";
    }

    paint() {
      if (!this.removal) return;
      const { state } = this.view.controller;
      const method = METHODS[state.show] && state.show !== "leave_one_out" ? state.show : "raw_attention";
      if (this.method === method) return;
      this.method = method;
      const charts = ["regions", "text"].map((part) => this.drawChart(part, method)).filter(Boolean);
      this.chart.replaceChildren(...charts);
      const first = this.view.source.doc.answers[0]?.text ?? "";
      this.about.textContent =
        `Probability of ${quote(first)} as more is taken away. A map that finds what matters falls at once when its ` +
        "strongest parts go first, and stays up when its weakest go first. Area: by the trapezoid rule.";
    }

    drawChart(part, method) {
      const lines = [
        [`${METHODS[method].name}, strongest first`, "vl-most", this.find(part, method, "most_first")],
        [`${METHODS[method].name}, weakest first`, "vl-least", this.find(part, method, "least_first")],
        method === "raw_attention"
          ? null
          : ["Raw attention, strongest first", "vl-raw", this.find(part, "raw_attention", "most_first")],
        ["Random order", "vl-random", this.find(part, "random", "random")],
      ].filter((line) => line?.[2]);
      if (!lines.length) return null;
      const [width, height, left, bottom] = [360, 170, 34, 30];
      const x = (share) => left + share * (width - left - 10);
      const y = (value) => 8 + (1 - clamp(value, 0, 1)) * (height - 8 - bottom);
      const marks = [0, 0.5, 1].flatMap((tick) => [
        draw("line", { class: "vl-grid", x1: left, x2: width - 10, y1: y(tick), y2: y(tick) }),
        draw("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toString()),
        draw("text", { x: x(tick), y: height - 14, "text-anchor": tick === 1 ? "end" : "middle" }, `${100 * tick} %`),
      ]);
      const what = part === "regions" ? "boxes" : "words";
      marks.push(draw("text", { x: (left + width) / 2, y: height - 1, "text-anchor": "middle" }, `${what} taken away`));
      for (const [, look, curve] of lines) {
        const points = curve.values.map((value, n) => `${x(this.removal.fractions[n])},${y(value)}`).join(" ");
        marks.push(draw("polyline", { class: `vl-curve ${look}`, points }));
      }
      const label = `${what}: ${lines.map(([name, , curve]) => `${name}, area ${curve.area.toFixed(2)}`).join("; ")}`;
      const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...marks);
      const legend = lines.map(([name, look, curve]) =>
        make(
          "li",
          { className: look },
          make("i", {}),
          make("span", { textContent: name }),
          make("b", { textContent: curve.area.toFixed(2) }),
        ),
      );
      return make("figure", { className: "vl-chart" }, svg, make("ul", {}, ...legend));
    }
  }

  // ---------------------------------------------------------------------------------------------- one document

  /** Everything about one document. */
  class View {
    constructor(controller, number, source, before) {
      this.controller = controller;
      this.number = number;
      this.id = `${controller.id}-${number}`;
      this.source = source;
      this.before = before;
      this.edits = { row: 0, words: new Set(), regions: new Set(), boxes: [] };
      this.answers = new Answers(this);
      this.heads = new HeadMap(this);
      this.truth = new Truth(this);
      this.verdict = make("p", { className: "vl-verdict" });
      this.legend = make("div", { className: "vl-legend" });
      this.caution = make("p", { className: "vl-caution" });
      this.readout = make("p", { className: "vl-readout", role: "status", "aria-live": "polite" });
      this.body = make("div", { className: "vl-body" });
      this.editor = controller.options.onEdit ? new Editor(this) : null;
      const { doc } = source;
      this.element = make(
        "article",
        { className: "vl-doc", "data-document": number },
        this.buildHead(doc),
        make(
          "div",
          { className: "vl-top" },
          this.answers.element,
          make("div", { className: "vl-says" }, this.verdict, this.readout),
        ),
        this.legend,
        this.editor?.element ?? "",
        this.body,
        this.caution,
        make("div", { className: "vl-panels" }, this.heads.element, this.truth.element),
      );
    }

    get palette() {
      return this.controller.palette;
    }

    buildHead({ model, notice }) {
      const several = this.controller.sources.length > 1;
      const facts = `${model.task} · weights ${model.checkpoint}`;
      return make(
        "header",
        { className: "vl-head" },
        several ? make("h3", { textContent: model.name }) : null,
        make("p", { className: "vl-small", textContent: several ? facts : `${model.name} · ${facts}` }),
        notice ? make("p", { className: "vl-notice", textContent: notice }) : null,
      );
    }

    /** Rows on the screen: all of them, or of choices about one picture the one that is asked for. */
    get rows() {
      const { rows } = this.source.doc;
      if (!this.source.oneRowAtATime) return rows.map((_, n) => n);
      const chosen = this.controller.state.row ?? this.rowOfAnswer();
      return [clamp(chosen, 0, rows.length - 1)];
    }

    /** The row that reads the chosen answer. */
    rowOfAnswer() {
      const { doc } = this.source;
      return Math.max(0, doc.choices.indexOf(doc.answers[this.source.answer(this.controller.state.answer)]?.text));
    }

    block(row) {
      return this.blocks.find((block) => block.number === row) ?? this.blocks[0];
    }

    rebuild() {
      const key = `${this.rows.join()} ${this.controller.state.pieces}`;
      if (key === this.built) return;
      this.built = key;
      this.blocks?.forEach((block) => block.destroy());
      this.blocks = this.rows.map((row) => new Block(this, row));
      this.body.replaceChildren(...this.blocks.map((block) => block.element));
    }

    /** Number of the locked word or region of a row; -1 if there is none. */
    lockedIndex(row, kind) {
      const lock = this.controller.state.lock;
      return lock && lock.document === this.number && lock.row === row && lock.kind === kind ? lock.index : -1;
    }

    crossed(row, kind) {
      return this.edits.row === row ? this.edits[kind] : new Set();
    }

    /** Boxes with a meaning: where the answer points, what is right, what the reader drew. */
    marks() {
      const { doc } = this.source;
      const answer = doc.answers[this.source.answer(this.controller.state.answer)];
      return [
        ...(doc.truth?.boxes ?? []).map((box) => ({ box, image: 0, name: "truth" })),
        ...(answer?.box ? [{ box: answer.box, image: 0, name: "answer" }] : []),
        ...this.edits.boxes.map((box) => ({ box: box.slice(0, 4), image: box[4], name: "drawn" })),
      ];
    }

    paint(chosen) {
      this.rebuild();
      const selection = chosen && this.rows.includes(chosen.row) ? chosen : null;
      let shown = null;
      for (const block of this.blocks) {
        const own = selection && selection.row === block.number ? selection : null;
        const found = block.paint(own);
        if (own || !shown) shown = { block, ...found };
      }
      this.answers.paint(selection);
      this.heads.paint(shown.block.number, selection);
      this.truth.paint();
      this.editor?.paint();
      this.paintLegend(shown);
      this.readout.textContent = selection ? this.describe(selection, shown) : "\u00a0";
      this.paintVerdict();
      const { show } = this.controller.state;
      const isAttention = ["attention", "raw_attention", "rollout"].includes(show);
      this.caution.textContent = isAttention
        ? `${ATTENTION_NOTE} ${this.truth.sentence("raw_attention")}`
        : this.truth.sentence(show);
    }

    /** The answer and what counted most, in one sentence; hovering does not change it. */
    paintVerdict() {
      const { state } = this.controller;
      if (this.spoken === state) return;
      this.spoken = state;
      const { doc } = this.source;
      const answer = doc.answers[this.source.answer(state.answer)];
      const strong = (text) => make("strong", { textContent: text });
      const best = (kind) => this.findBest(kind);
      const [region, word] = [best("regions"), best("words")];
      const parts = [...this.nameAnswer(answer, strong), answer ? ` (${percent(answer.probability)})` : ""];
      if (state.show === "attention") parts.push(`. ${capitalise(this.controller.describeHeads(this))}: `);
      else if (state.versus !== null) parts.push(` and not ${state.versus}: for this spoke most `);
      else
        parts.push(
          state.evidence === "against" && state.show === "relevance"
            ? ": against this spoke most "
            : ": what counted most was ",
        );
      if (region) parts.push(state.show === "attention" ? "most weight lies on " : "", strong(region));
      if (region && word) parts.push(" and ");
      if (word) parts.push(state.show === "attention" && !region ? "most weight lies on " : "the word ", strong(word));
      parts.push(region || word ? "." : "nothing that is shown here.");
      this.verdict.replaceChildren(...parts);
    }

    /** The answer, or what is pointed at and by what. */
    nameAnswer(answer, strong) {
      const { doc } = this.source;
      if (!answer) return [strong("No answer")];
      const region = doc.rows[0].regions[answer.region];
      if (!region) return [strong(answer.text)];
      return doc.answers_are === "phrases"
        ? [strong(answer.text), " points at ", strong(region.name)]
        : ["points at ", strong(answer.text)];
    }

    /** Name of the word or region with the largest value over the rows that are shown. */
    findBest(kind) {
      let best = null;
      for (const block of this.blocks) {
        const { values } = block.compute(null);
        const list = values[kind];
        const special = kind === "words" ? block.units : block.row.regions;
        list?.forEach((value, n) => {
          const size = this.controller.state.evidence === "against" ? Math.abs(value) : value;
          if (!special[n].special && size > (best?.size ?? 0))
            best = { size, name: block.nameOf(kind, n), label: block.row.label };
        });
      }
      if (!best) return null;
      return this.blocks.length > 1 && kind === "regions" ? `${best.name} (${best.label})` : best.name;
    }

    /** What a selection means, in words. */
    describe({ kind, index }, { block, values }) {
      const { state } = this.controller;
      const name = block.nameOf(kind, index);
      if (state.show === "attention") {
        const { from, to, says } = DIRECTIONS[state.direction];
        const other = kind === from ? to : from;
        const list = values[other];
        if (!list || (kind !== from && kind !== to))
          return `${quote(name)} is not part of ${DIRECTIONS[state.direction].label}.`;
        const best = rank(list)
          .slice(0, 3)
          .map((n) => `${block.nameOf(other, n)} ${format(list[n])}`);
        return kind === from
          ? `${quote(name)}: ${says}: ${best.join(", ")}.`
          : `${quote(name)} is looked at by ${best.join(", ")}.`;
      }
      const list = values[kind];
      if (!list) return quote(name);
      const place = rank(list, (n) => (kind === "words" ? block.units : block.row.regions)[n].special).indexOf(index);
      const what = kind === "words" ? "words" : "boxes";
      return `${quote(name)}: ${format(list[index])}${place < 0 ? "" : `, ${ordinal(place + 1)} of the ${what}`}.`;
    }

    paintLegend({ values, scale }) {
      const { state } = this.controller;
      const signed = [values.words, values.regions].some((list) => list?.some((value) => value < 0));
      const stop = (strength) => this.palette.css(strength);
      const low = signed ? -1 : 0;
      const stops = Array.from({ length: 9 }, (_, n) => stop(low + ((1 - low) * n) / 8));
      const bar = make("i", {});
      bar.style.background = `linear-gradient(to right in oklab, ${stops.join(",")})`;
      const method = METHODS[state.show];
      const what = method ? `${method.name.toLowerCase()}: ${method.says}` : "attention weight";
      const reach = state.scale === "shared" ? "same scale everywhere" : "scale of this view";
      this.legend.replaceChildren(
        make("span", { textContent: signed ? format(-scale) : "0" }),
        bar,
        make("span", { textContent: format(scale) }),
        make("span", { className: "vl-small", textContent: `${what}; ${reach}` }),
      );
    }
  }

  // ---------------------------------------------------------------------------------------------- asking again

  /** Taking words and boxes away and drawing new ones, where somebody listens who asks the model again. */
  class Editor {
    constructor(view) {
      this.view = view;
      this.cross = make("button", { type: "button", className: "vl-button", onclick: () => this.toggle() });
      this.draw = make("button", {
        type: "button",
        className: "vl-button",
        textContent: "Draw a box",
        onclick: () => this.setDrawing(!this.drawing),
      });
      this.reset = make("button", {
        type: "button",
        className: "vl-button",
        textContent: "Put everything back",
        onclick: () => this.clear(),
      });
      this.element = make(
        "div",
        { className: "vl-editor", role: "group", "aria-label": "Change and ask again" },
        this.cross,
        view.source.doc.images.length ? this.draw : "",
        this.reset,
      );
      view.body.addEventListener("pointerdown", (event) => this.start(event));
      this.setDrawing(false);
    }

    setDrawing(on) {
      this.drawing = on;
      this.draw.setAttribute("aria-pressed", on);
      this.view.body.classList.toggle("vl-drawing", on);
    }

    /** The locked word or region of this document. */
    get locked() {
      const { lock } = this.view.controller.state;
      return lock && lock.document === this.view.number ? lock : null;
    }

    numberOf({ row, kind, index }) {
      return kind === "words" ? this.view.block(row).units[index].word : index;
    }

    toggle() {
      const lock = this.locked;
      const { edits } = this.view;
      if (edits.row !== lock.row) Object.assign(edits, { row: lock.row, words: new Set(), regions: new Set() });
      const gone = edits[lock.kind];
      const number = this.numberOf(lock);
      if (!gone.delete(number)) gone.add(number);
      this.report();
    }

    clear() {
      Object.assign(this.view.edits, { words: new Set(), regions: new Set(), boxes: [] });
      this.report();
    }

    /** A box from where the pointer goes down to where it is let go. */
    start(event) {
      const picture =
        this.drawing &&
        this.view.blocks.flatMap((block) => block.pictures).find((one) => one.svg.contains(event.target));
      if (!picture) return;
      event.preventDefault();
      const at = (moved) => {
        const frame = picture.svg.getBoundingClientRect();
        const x = clamp((moved.clientX - frame.left) / picture.zoom, 0, picture.image.width);
        const y = clamp((moved.clientY - frame.top) / picture.zoom, 0, picture.image.height);
        return [x, y];
      };
      const first = at(event);
      const { boxes } = this.view.edits;
      const number = boxes.length;
      const move = (moved) => {
        const last = at(moved);
        const [x1, x2] = [first[0], last[0]].sort((a, b) => a - b);
        const [y1, y2] = [first[1], last[1]].sort((a, b) => a - b);
        boxes[number] = [x1, y1, x2, y2, picture.number];
        this.view.controller.paint();
      };
      const end = () => {
        window.removeEventListener("pointermove", move);
        window.removeEventListener("pointerup", end);
        this.setDrawing(false);
        const box = boxes[number];
        if (box && (box[2] - box[0] < 2 || box[3] - box[1] < 2)) boxes.length = number;
        if (boxes.length > number) this.report();
      };
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", end);
    }

    report() {
      const { edits, number, controller } = this.view;
      controller.paint();
      controller.options.onEdit({
        document: number,
        row: edits.row,
        without_words: [...edits.words].sort((a, b) => a - b),
        without_regions: [...edits.regions].sort((a, b) => a - b),
        boxes: edits.boxes,
      });
    }

    paint() {
      const lock = this.locked;
      const { edits } = this.view;
      const gone = lock && this.view.crossed(lock.row, lock.kind).has(this.numberOf(lock));
      const name = lock && quote(this.view.block(lock.row).nameOf(lock.kind, lock.index));
      this.cross.disabled = !lock;
      this.cross.textContent = lock
        ? `${gone ? "Put back" : "Take away"} ${name}`
        : "Click a word or a box to take it away";
      this.reset.hidden = !(edits.words.size || edits.regions.size || edits.boxes.length);
    }
  }

  // ---------------------------------------------------------------------------------------------- what is shown

  /** The menus above the view. */
  class Toolbar extends Menus {
    constructor(controller) {
      super(controller);
      const sources = controller.sources;
      const methods = Object.keys(METHODS).filter((name) => sources.some((source) => source.methods.includes(name)));
      const directions = Object.keys(DIRECTIONS).filter((name) =>
        sources.some((source) => source.directions.includes(name)),
      );
      const first = sources[0];
      const answers = first.doc.answers.map((answer, n) => [first.keys[n], answer.text]);
      const { rows } = first.doc;
      const attention = (state) => state.show === "attention";
      this.show = this.choose("show", "Colours show", [
        ...methods.map((name) => [name, METHODS[name].name]),
        ["attention", "Attention of heads"],
      ]);
      const fields = make(
        "div",
        { className: "vl-fields", role: "group", "aria-label": "What is shown" },
        this.show,
        rows.length > 1 && first.oneRowAtATime
          ? this.choose("row", "Reading", [["", "that of the answer"], ...rows.map((row, n) => [String(n), row.label])])
          : null,
        first.doc.answers_are === "alternatives" && answers.length > 1
          ? this.choose("versus", "Why not", [["", "–"], ...answers], (state) => !attention(state))
          : null,
        sources.some((source) => source.doc.against?.length)
          ? this.segments(
              "evidence",
              "Evidence",
              [
                ["for", "for it"],
                ["against", "against it"],
              ],
              (state) => state.show === "relevance",
            )
          : null,
        this.segments(
          "direction",
          "Direction",
          directions.map((name) => [name, DIRECTIONS[name].label, DIRECTIONS[name].says]),
          attention,
        ),
        this.chooseCells("Layer", 0, attention),
        this.chooseCells("Head", 1, attention),
        this.segments(
          "how",
          "Several heads",
          [
            ["mean", "mean"],
            ["max", "maximum"],
          ],
          attention,
        ),
        this.segments("scale", "Scale", [
          ["shared", "same everywhere"],
          ["view", "this view"],
        ]),
        this.check("lines", "lines", attention),
        this.check("light", "darken the rest"),
        sources.some((source) => source.doc.rows.some((row) => row.words.some((word) => word.tokens.length > 1)))
          ? this.check("pieces", "word pieces")
          : null,
      );
      const wide = window.matchMedia("(min-width: 721px)").matches;
      this.element = make(
        "details",
        { className: "vl-toolbar", open: wide },
        make("summary", { textContent: "What is shown" }),
        fields,
      );
    }
  }

  let controllers = 0;

  /** The state, who is told of it, and what the pointer and the keyboard do. */
  class Controller {
    constructor(container, documents, options = {}) {
      this.id = controllers++;
      this.container = container;
      this.options = options;
      this.sources = documents.map((doc) => new Source(doc));
      this.state = this.normalise({ ...DEFAULTS, ...options.state });
      this.hovered = null;
      this.root = make("div", { className: "vl", "data-columns": documents.length });
      container.replaceChildren(this.root);
      this.refreshPalette();
      this.views = this.sources.map((source, n) => new View(this, n, source, options.before?.[n] ?? null));
      this.toolbar = new Toolbar(this);
      this.exports = new Exports(this);
      const columns = make("div", { className: "vl-columns" }, ...this.views.map((view) => view.element));
      columns.style.setProperty("--vl-count", documents.length);
      const questions = [...new Set(documents.map((doc) => doc.question))];
      const heading = make("h2", { textContent: questions.join(" · ") });
      this.root.append(heading, this.toolbar.element, columns, this.exports.element);
      this.listen();
      this.paint();
    }

    /** A state whose fields all have a meaning for these documents. */
    normalise(state) {
      const methods = this.sources.flatMap((source) => source.methods);
      const shows = [...methods, "attention"];
      const directions = this.sources.flatMap((source) => source.directions);
      const keys = this.sources.flatMap((source) => source.keys);
      const among = (value, valid, otherwise) => (valid.includes(value) ? value : otherwise);
      return {
        ...state,
        show: among(state.show, shows, shows[0]),
        answer: among(state.answer, keys, null),
        versus: among(state.versus, keys, null),
        evidence: among(state.evidence, ["for", "against"], "for"),
        direction: among(state.direction, directions, directions[0] ?? "text_to_text"),
        cells: /^(all|(\d+|\*)\.(\d+|\*)(,(\d+|\*)\.(\d+|\*))*)$/.test(state.cells) ? state.cells : "all",
        how: among(state.how, ["mean", "max"], "mean"),
        scale: among(state.scale, ["shared", "view"], "shared"),
        row: Number.isInteger(state.row) ? state.row : null,
        lock: this.checkLock(state.lock, state.pieces),
      };
    }

    checkLock(lock, pieces) {
      const source = lock && this.sources[lock.document];
      const row = source?.doc.rows[lock.row];
      if (!row) return null;
      const count =
        lock.kind === "words"
          ? source.units(lock.row, pieces).length
          : lock.kind === "regions"
            ? row.regions.length
            : 0;
      return Number.isInteger(lock.index) && lock.index >= 0 && lock.index < count ? lock : null;
    }

    set(changes) {
      const next = { ...this.state, ...changes };
      // Maps of another direction have other layers, and pieces other numbers.
      if (changes.direction && changes.direction !== this.state.direction && !changes.cells) next.cells = "all";
      if ("pieces" in changes && changes.pieces !== this.state.pieces && !changes.lock) next.lock = null;
      if (changes.answer !== undefined && changes.row === undefined) next.row = null;
      this.state = this.normalise(next);
      this.paint();
      this.options.onState?.(this.state);
    }

    clear() {
      this.hovered = null;
      this.set({ lock: null });
    }

    hover(target) {
      if (same(target, this.hovered)) return;
      this.hovered = target;
      this.paint();
    }

    paint() {
      const chosen = this.hovered ?? this.state.lock;
      for (const view of this.views) view.paint(chosen && this.translate(chosen, view));
      if (this.painted === this.state) return; // what follows is the same under every selection
      this.painted = this.state;
      this.toolbar.paint(this.state);
      this.exports.paint();
    }

    /** What a selection in one document is in another: the same word, the box that covers it best; null if neither. */
    translate(selection, view) {
      if (view.number === selection.document) return selection;
      const from = this.sources[selection.document];
      const row = Math.min(selection.row, view.source.doc.rows.length - 1);
      const index =
        selection.kind === "words"
          ? this.matchWord(from, view.source, selection, row)
          : matchRegion(from, view.source, selection, row);
      return index < 0 ? null : { ...selection, document: view.number, row, index };
    }

    matchWord(from, to, selection, row) {
      const { pieces } = this.state;
      const own = from.units(selection.row, pieces);
      const { text } = own[selection.index];
      const before = own.slice(0, selection.index).filter((unit) => unit.text === text).length;
      const alike = to.units(row, pieces).flatMap((unit, n) => (unit.text === text ? [n] : []));
      return alike[before] ?? -1;
    }

    /** The weight that the strongest colour stands for. */
    scale(block, values) {
      const { state } = this;
      if (state.scale === "view") return largest(values, block.units, block.row.regions) || 1;
      if (state.show === "attention") return Math.max(...this.sources.map((source) => source.doc.scale)) || 1;
      const able = this.sources.filter((source) => source.methods.includes(state.show));
      const answers = [state.answer, ...(state.versus === null ? [] : [state.versus])];
      const reach = (source, answer) => source.reach(state.show, source.answer(answer), state.evidence);
      return Math.max(...able.flatMap((source) => answers.map((answer) => reach(source, answer)))) || 1;
    }

    /** Which heads are shown. */
    describeHeads(view) {
      const { cells, how, direction } = this.state;
      const layers = view.source.layers(0, direction);
      const chosen = readCells(cells);
      const heads = layers.flatMap((layer, l) =>
        range(layer.directions[direction].heads)
          .filter((h) => chosen(l, h))
          .map((h) => [layer, h]),
      );
      const all = sum(layers, (layer) => layer.directions[direction].heads);
      if (heads.length === 1) return `${nameLayer(heads[0][0].name)}, head ${heads[0][1]}`;
      const word = how === "max" ? "maximum" : "mean";
      return heads.length && heads.length < all ? `${word} of ${heads.length} heads` : `${word} of all ${all} heads`;
    }

    refreshPalette() {
      this.palette = new Palette(this.root);
      this.theme = this.palette.strong.positive;
    }

    // ------------------------------------------------------------------ pointer and keyboard

    /** The word or region that an element stands for. */
    target(element) {
      const unit = element.closest?.("[data-kind]");
      if (!unit || !this.root.contains(unit)) return null;
      return {
        document: +unit.closest("[data-document]").dataset.document,
        row: +unit.closest("[data-row]").dataset.row,
        kind: unit.dataset.kind,
        index: +unit.dataset.index,
      };
    }

    listen() {
      const { root } = this;
      root.addEventListener(
        "pointerover",
        (event) => event.pointerType !== "touch" && this.hover(this.target(event.target)),
      );
      root.addEventListener("pointerleave", () => this.hover(null));
      root.addEventListener(
        "focusin",
        (event) => event.target.matches(":focus-visible") && this.hover(this.target(event.target)),
      );
      root.addEventListener("focusout", () => this.hover(null));
      root.addEventListener("click", (event) => this.click(event));
      root.addEventListener("keydown", (event) => this.press(event));
      this.onTheme = () => {
        this.refreshPalette();
        this.paint();
      };
      this.media = window.matchMedia("(prefers-color-scheme: dark)");
      this.media.addEventListener("change", this.onTheme);
      this.themes = new MutationObserver(this.onTheme);
      this.themes.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    }

    click(event) {
      const bar = event.target.closest("[data-answer]");
      if (bar) return this.chooseAnswer(bar);
      const target = this.target(event.target);
      if (target) this.set({ lock: same(target, this.state.lock) ? null : target });
    }

    chooseAnswer(bar) {
      const number = +bar.closest("[data-document]").dataset.document;
      const source = this.sources[number];
      const answer = +bar.dataset.answer;
      this.set({ answer: source.keys[answer] });
      this.options.onAnswer?.(source.doc.answers[answer], number);
    }

    press(event) {
      if (event.key === "Escape") return this.clear();
      const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -1e9, End: 1e9 };
      const group = event.target.closest(".vl-words, .vl-list");
      if (!(event.key in steps) || !group || !event.target.matches("[data-kind]")) return undefined;
      const all = [...group.querySelectorAll("[data-kind]")];
      const next = all[clamp(all.indexOf(event.target) + steps[event.key], 0, all.length - 1)];
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      event.preventDefault();
      return undefined;
    }

    destroy() {
      this.media.removeEventListener("change", this.onTheme);
      this.themes.disconnect();
      for (const view of this.views) view.blocks.forEach((block) => block.destroy());
      this.root.remove();
    }
  }

  const same = (a, b) =>
    a === b || (a && b && a.document === b.document && a.row === b.row && a.kind === b.kind && a.index === b.index);

  /** The region of another document that covers a region best, by more than half of both together; -1 if none does. */
  function matchRegion(from, to, selection, row) {
    const region = from.doc.rows[selection.row].regions[selection.index];
    const others = to.doc.rows[row].regions;
    if (!region.box) return others.findIndex((other) => other.name === region.name);
    let [best, most] = [-1, 0.5];
    others.forEach((other, n) => {
      if (!other.box || other.image !== region.image || other.special !== region.special) return;
      const shared = overlap(region.box, other.box);
      const share = shared / (area(region.box) + area(other.box) - shared || 1);
      if (share > most) [best, most] = [n, share];
    });
    return best;
  }

  // ---------------------------------------------------------------------------------------------- taking it away

  /** The figure on the screen as a vector or a bitmap, its numbers, and a caption. */
  class Exports {
    constructor(controller) {
      this.controller = controller;
      const button = (text, act) =>
        make("button", { type: "button", className: "vl-button", textContent: text, onclick: act });
      this.text = make("textarea", {
        className: "vl-caption",
        readOnly: true,
        rows: 4,
        "aria-label": "Caption for LaTeX",
      });
      this.element = make(
        "section",
        { className: "vl-exports" },
        make("h3", { textContent: "Take it away" }),
        make(
          "div",
          { className: "vl-buttons" },
          button("SVG", () => this.save("svg", this.svg(), "image/svg+xml")),
          button("PNG, 2×", async () => this.save("png", await this.png())),
          button("CSV", () => this.save("csv", this.csv(), "text/csv")),
          button("JSON", () => this.save("json", this.json(), "application/json")),
          button("Copy caption", () => this.copy()),
        ),
        this.text,
      );
    }

    paint() {
      this.text.value = this.caption();
    }

    async copy() {
      this.text.select();
      await navigator.clipboard?.writeText(this.text.value).catch(() => document.execCommand("copy"));
    }

    save(ending, content, type) {
      const blob = content instanceof Blob ? content : new Blob([content], { type });
      const address = URL.createObjectURL(blob);
      const { model, question } = this.controller.sources[0].doc;
      const name = `${model.name}-${question}`
        .toLowerCase()
        .replace(/[^a-z0-9]+/g, "-")
        .slice(0, 60)
        .replace(/^-|-$/g, "");
      make("a", { href: address, download: `${name}.${ending}` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 10000);
    }

    json() {
      const docs = this.controller.sources.map((source) => source.doc);
      return JSON.stringify(docs.length === 1 ? docs[0] : docs);
    }

    /** A line for each word and box: its names, its scores for the chosen answer by every method, and what is shown. */
    csv() {
      const { state, views, sources } = this.controller;
      const methods = [...new Set(sources.flatMap((source) => source.methods))];
      const lines = [
        [
          "model",
          "row",
          "kind",
          "number",
          "name",
          "special",
          "image",
          "x1",
          "y1",
          "x2",
          "y2",
          "answer",
          ...methods,
          "shown",
        ],
      ];
      for (const view of views) {
        const { doc } = view.source;
        const answer = view.source.answer(state.answer);
        const chosen = this.controller.state.lock;
        for (const block of view.blocks) {
          const own = chosen && this.controller.translate(chosen, view);
          const { values } = block.compute(own?.row === block.number ? own : null);
          const scores = methods.map((method) =>
            view.source.methods.includes(method)
              ? view.source.scoresOf(block.number, method, answer, block.units, "for")
              : {},
          );
          const add = (kind, n, name, special, image, box) =>
            lines.push([
              doc.model.name,
              block.number,
              kind,
              n,
              name,
              special,
              image ?? "",
              ...(box ?? ["", "", "", ""]),
              doc.answers[answer]?.text ?? "",
              ...scores.map((one) => one[kind]?.[n] ?? ""),
              values[kind]?.[n] ?? "",
            ]);
          block.units.forEach((unit, n) => add("words", n, unit.text, unit.special));
          block.row.regions.forEach((region, n) =>
            add("regions", n, region.name, region.special, region.image, region.box),
          );
        }
      }
      const cell = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
      return `${lines.map((line) => line.map(cell).join(",")).join("\n")}\n`;
    }

    /** A caption for LaTeX that says what is shown, of which model, and how to make it again. */
    caption() {
      const { state, views } = this.controller;
      const tex = (text) =>
        text.replace(
          /[\\{}$&#%_^~]/g,
          (c) => ({ "\\": "\\textbackslash{}", "^": "\\^{}", "~": "\\~{}" })[c] ?? `\\${c}`,
        );
      const heads = this.controller.describeHeads(views[0]);
      const against = state.evidence === "against" && state.show === "relevance" ? ", evidence against the answer" : "";
      const what =
        state.show === "attention"
          ? `attention (${DIRECTIONS[state.direction].label.replace("→", "to")}; ${heads})`
          : METHODS[state.show].name.toLowerCase().replace("×", "times") + against;
      const models = views.map((view) => {
        const { model, answers } = view.source.doc;
        const answer = answers[view.source.answer(state.answer)];
        const sure = answer ? `: ${tex(answer.text)} (${(100 * answer.probability).toFixed(0)}\\,\\%)` : "";
        return `${tex(model.name)}, weights \\texttt{${model.checkpoint}}${sure}`;
      });
      const question = tex(views[0].source.doc.question);
      const versus = state.versus === null ? "" : `, minus that of ${tex(state.versus)}`;
      const commands = [...new Set(views.map((view) => view.source.doc.model.command))].map(
        (command) => `\\texttt{${tex(command)}}`,
      );
      const made = `${models.join("; ")}. Made by ${commands.join(" and ")}.`;
      return `\\caption{\`\`${question}'' Colours: ${what}${versus}. ${made}}`;
    }

    svg() {
      return new Figure(this.controller).toString();
    }

    /** The figure at twice its size. */
    async png() {
      const figure = new Figure(this.controller);
      const picture = new Image();
      picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(figure.toString())}`;
      await picture.decode();
      const canvas = make("canvas", { width: 2 * figure.width, height: 2 * figure.height });
      canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
      return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    }
  }

  const FIGURE_STYLE =
    "text { font: 13px system-ui, sans-serif } .vl-labels text { font: 600 12px system-ui, sans-serif } " +
    ".vl-halo { fill: none; stroke: #fff } .vl-mark { fill: none; stroke: #0b7a75; stroke-width: 2 }";

  /** What is on the screen as one SVG without a style sheet around it. */
  class Figure {
    constructor(controller) {
      this.controller = controller;
      this.column = 900;
      const style = getComputedStyle(controller.root);
      this.ink = style.color;
      this.paper = style.getPropertyValue("--vl-paper").trim();
      const groups = controller.views.map((view, n) => this.drawView(view, n * (this.column + 40)));
      this.width = controller.views.length * (this.column + 40);
      this.height = Math.ceil(Math.max(...groups.map((group) => group.bottom)) + 20);
      this.svg = draw(
        "svg",
        {
          xmlns: "http://www.w3.org/2000/svg",
          viewBox: `0 0 ${this.width} ${this.height}`,
          width: this.width,
          height: this.height,
        },
        draw("style", {}, FIGURE_STYLE),
        draw("rect", { width: this.width, height: this.height, fill: this.paper }),
        ...groups.map((group) => group.element),
      );
    }

    text(x, y, words, attributes = {}) {
      return draw("text", { x, y, fill: this.ink, ...attributes }, words);
    }

    drawView(view, left) {
      const { doc } = view.source;
      const { state } = this.controller;
      const element = draw("g", { transform: `translate(${left + 20} 0)` });
      element.append(
        this.text(0, 30, doc.question, { style: "font-size: 18px; font-weight: 700" }),
        this.text(0, 50, `${doc.model.name}, weights ${doc.model.checkpoint}`, { "fill-opacity": 0.7 }),
      );
      let y = 74;
      const answers = doc.answers.slice(0, MOST_BARS);
      answers.forEach((answer, n) => {
        const chosen = n === view.source.answer(state.answer);
        element.append(
          this.text(0, y + 11, answer.text.slice(0, 46), { style: `font-weight: ${chosen ? 700 : 400}` }),
          draw("rect", { x: 300, y, width: 400, height: 12, rx: 6, fill: this.ink, "fill-opacity": 0.1 }),
          draw("rect", {
            x: 300,
            y,
            width: Math.max(1, 400 * answer.probability),
            height: 12,
            rx: 6,
            fill: this.ink,
            "fill-opacity": chosen ? 0.75 : 0.35,
          }),
          this.text(712, y + 11, percent(answer.probability)),
        );
        y += 22;
      });
      y += 10;
      for (const block of view.blocks) y = this.drawBlock(block, element, y);
      const legend = [...view.legend.children].map((part) => part.textContent).filter(Boolean);
      element.append(
        this.text(0, y + 8, `Scale: ${legend.slice(0, 2).join(" to ")} (${legend[2]})`, { "fill-opacity": 0.7 }),
      );
      return { element, bottom: y + 20 };
    }

    drawBlock(block, element, top) {
      const selection = this.controller.state.lock && this.controller.translate(this.controller.state.lock, block.view);
      const own = selection?.row === block.number ? selection : null;
      const { values, scale } = block.compute(own);
      const places = { words: [], regions: [] };
      let y = top;
      for (const picture of block.pictures) {
        if (!picture.width) continue;
        const zoom = 430 / picture.width;
        const copy = draw(
          "g",
          { transform: `translate(0 ${y}) scale(${zoom})` },
          ...[...picture.svg.children].map((part) => part.cloneNode(true)),
        );
        copy.querySelectorAll(".vl-hit").forEach((hit) => hit.remove());
        element.append(copy);
        for (const box of picture.boxes) {
          const at = picture.middle(box.index).map((value) => value * zoom);
          at[1] += y;
          places.regions[box.index] = { at, towards: at };
        }
        y += picture.height * zoom + 12;
      }
      const bottom = this.drawSide(block, element, top, values, scale, places);
      this.drawLines(block, element, own, scale, places);
      return Math.max(y, bottom) + 8;
    }

    /** Words and the strongest boxes, right of the picture; returns where they end. */
    drawSide(block, element, top, values, scale, places) {
      const { palette } = this.controller;
      let [x, y] = [460, top];
      block.units.forEach((unit, n) => {
        const width = measure(unit.text, "13px system-ui, sans-serif") + 14;
        if (x + width > this.column) [x, y] = [460, y + 32];
        const strength = values.words ? values.words[n] / scale : 0;
        element.append(
          draw("rect", {
            x,
            y,
            width,
            height: 24,
            rx: 5,
            fill: palette.css(strength),
            "fill-opacity": unit.special ? 0.6 : 1,
          }),
          this.text(x + 7, y + 16, unit.text, { fill: palette.ink(strength) }),
        );
        places.words[n] = { at: [x + width / 2, y + 24], towards: [x + width / 2, y + 64] };
        x += width + 5;
      });
      y += 44;
      const order = values.regions ? block.sort(values.regions).slice(0, 8) : [];
      for (const n of order) {
        const value = values.regions[n];
        element.append(
          this.text(460, y + 11, block.row.regions[n].name.slice(0, 34)),
          draw("rect", {
            x: 690,
            y: y + 1,
            width: Math.max(1, 140 * clamp(Math.abs(value) / scale, 0, 1)),
            height: 11,
            rx: 5,
            fill: palette.hue(value),
          }),
          this.text(842, y + 11, format(value)),
        );
        y += 20;
      }
      return y;
    }

    drawLines(block, element, selection, scale, places) {
      const { state, palette } = this.controller;
      if (!state.lines || state.show !== "attention") return;
      const { from, to } = DIRECTIONS[state.direction];
      for (const { start, end, weight } of block.links(selection).slice(0, MOST_LINES)) {
        const [a, b] = [places[from][start], places[to][end]];
        if (a && b) element.append(drawCurve(a, b, clamp(weight / scale, 0, 1), { stroke: palette.boxHue(1) }));
      }
    }

    toString() {
      return new XMLSerializer().serializeToString(this.svg);
    }
  }

  // ---------------------------------------------------------------------------------------------- addresses

  /** The fields of a state that are not as by default, for the fragment of an address. */
  function stateToFragment(state) {
    const fields = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) {
      if (!(name in DEFAULTS) || value === DEFAULTS[name] || value === null) continue;
      fields.set(name, name === "lock" ? [value.document, value.row, value.kind, value.index].join(".") : value);
    }
    return fields.toString();
  }

  /** The state that a fragment stands for; what it does not name is as by default. */
  function fragmentToState(fragment) {
    const state = {};
    for (const [name, text] of new URLSearchParams(fragment.replace(/^#/, ""))) {
      if (!(name in DEFAULTS)) continue;
      if (typeof DEFAULTS[name] === "boolean") state[name] = text === "true";
      else if (name === "row") state.row = Number(text);
      else if (name === "lock") {
        const [document_, row, kind, index] = text.split(".");
        state.lock = { document: +document_, row: +row, kind, index: +index };
      } else state[name] = text;
    }
    return state;
  }

  function render(container, documents, options) {
    const controller = new Controller(container, documents, options);
    return controller;
  }

  /** Draw the page that holds its documents itself; its state is the fragment of the address. */
  function open(container, documents, first = {}) {
    const read = () => ({ ...first, ...fragmentToState(location.hash) });
    const onState = (state) => history.replaceState(null, "", `#${stateToFragment(state)}`);
    const controller = render(container, documents, { state: read(), onState });
    window.addEventListener("hashchange", () => controller.set({ ...DEFAULTS, ...read() }));
    return controller;
  }

  window.visling = { render, open, stateToFragment, fragmentToState };
})();
