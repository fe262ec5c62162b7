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
    regions_to_regions: { from: "regions", to: "regions", label: "boxes → boxes", says: "this box looks at these boxes" },
  };

  const METHODS = {
    relevance: { name: "Relevance", says: "attention weighted by its gradient through all layers (Chefer et al. 2021)" },
    attention_gradient: { name: "Attention × gradient", says: "of the last layer" },
    input_gradient: { name: "Input × gradient", says: "signed: what spoke for the answer, and what against it" },
    rollout: { name: "Attention rollout", says: "attention multiplied through the layers; the same for every answer" },
    raw_attention: { name: "Raw attention", says: "of the last layer; the same for every answer" },
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
  const MOST_LINES = 40;
  const MOST_BARS = 5; // answers shown before "more"
  const ATTENTION_NOTE = "Attention is not an explanation: it shows where heads look, not what decided the answer.";
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
  const quote = (text) => `“${text}”`;
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
  const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] ?? "th");

  /** A weight with three digits. */
  function format(value) {
    const size = Math.abs(value);
    const text = size === 0 ? "0" : size >= 0.001 ? size.toFixed(size >= 10 ? 1 : size >= 0.1 ? 2 : 3) : "<0.001";
    return value < 0 ? `−${text}` : text;
  }

  /** "layers.0" -> "layer 0", "co_attention_layers.1" -> "co-attention layer 1". */
  function nameLayer(name) {
    return name.replace("co_attention", "co-attention").replace(/_?layers\b/, " layer").replaceAll(".", " ").trim();
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
      this.steps = { positive: this.ramp(paper, positive), negative: this.ramp(paper, negative) };
      this.strong = { positive: `rgb(${positive})`, negative: `rgb(${negative})` };
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
      const [r, g, b] = this.rgb(strength).map((v) => (v / 255 <= 0.04045 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#14171c" : "#ffffff";
    }

    hue(value) {
      return value < 0 ? this.strong.negative : this.strong.positive;
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
          ? word.tokens.map((token, k) => ({ text: word.pieces[k], tokens: [token], special: word.special, word: number }))
          : [{ text: word.text, tokens: word.tokens, special: word.special, word: number }]
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
          (rows) => sum(rows, (m) => sum(columns, (n) => map.weights[m * map.to + n])) / rows.length
        );
        return values;
      }
      const rows =
        selection && selection.kind === from
          ? groups[from][selection.index]
          : groups[from].flatMap((tokens, n) => (special[from][n] ? [] : tokens));
      values[to] = groups[to].map((columns) =>
        rows.length ? sum(rows, (m) => sum(columns, (n) => map.weights[m * map.to + n])) / rows.length : 0
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
        const known = this.doc.leave_one_out.rows[row];
        const base = this.doc.answers[answer].probability;
        const fall = (shares) => (shares ? base - shares[answer] : 0);
        return { words: units.map((unit) => fall(known.words[unit.word])), regions: known.regions.map(fall) };
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

    /** Largest size of what is no special token, over all answers of a method. */
    reach(method, evidence) {
      const key = `${method} ${evidence}`;
      if (!this.largest.has(key)) {
        let most = 0;
        this.doc.rows.forEach((row, number) => {
          const units = this.units(number, false);
          this.doc.answers.forEach((_, answer) => {
            most = Math.max(most, largest(this.scoresOf(number, method, answer, units, evidence), units, row.regions));
          });
        });
        this.largest.set(key, most);
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
      this.element.style.aspectRatio = `${this.image.width} / ${this.image.height}`;
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
      place(this.photo, [0, 0, width, this.height]);
      for (const box of this.boxes) {
        box.at = box.box.map((corner) => corner * this.zoom);
        for (const shape of [box.halo, box.outline, box.hit]) place(shape, box.at);
      }
      if (this.last) this.paint(...this.last);
    }

    /** Show weights; `look` says how strong each is, which boxes are emphasised and what the answer points at. */
    paint(values, look) {
      this.last = [values, look];
      if (!this.width) return;
      const order = values ? rank(values, (n) => this.block.row.regions[n].special) : [];
      const filled = new Set(order.slice(0, MOST_FILLED));
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
      this.paintLabels(values, look, order);
      this.paintShade(values, look);
      this.svg.setAttribute("aria-label", this.describe(values, order));
    }

    style(value, strength, active, filled, special) {
      const { palette } = this.block.view;
      return {
        stroke: palette.hue(value),
        width: active ? 4 : special ? 1.5 : 1 + 3 * strength,
        opacity: active ? 1 : 0.35 + 0.65 * strength,
        fill: active ? 0.3 : filled && strength > 0 ? 0.1 + 0.25 * strength : 0,
      };
    }

    /** Names on the strongest and the emphasised boxes, each where it hides the least. */
    paintLabels(values, look, order) {
      const named = [...look.active, ...order.slice(0, MOST_FILLED).filter((n) => !look.active.has(n))];
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
        const value = values ? values[index] : 0;
        const strength = Math.sign(value) * Math.max(0.85, Math.abs(value) / look.scale) || 0.85;
        labels.push(
          draw("rect", { x: spot[0], y: spot[1], width: label.width, height: 19, rx: 4, fill: this.block.view.palette.css(strength) }),
          draw("text", { x: spot[0] + 6, y: spot[1] + 13.5, fill: this.block.view.palette.ink(strength) }, label.text)
        );
      }
      for (const { box, name } of look.marks.filter((mark) => mark.image === this.number)) {
        const [x1, y1, x2, y2] = box.map((corner) => corner * this.zoom);
        labels.unshift(
          draw("rect", { class: `vl-mark vl-mark-${name}`, x: x1 - 3, y: y1 - 3, width: x2 - x1 + 6, height: y2 - y1 + 6, rx: 3 })
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

    /** The corner next to a box at which a label hides the fewest labels; null if it would hide one for the most part. */
    findSpot([x1, y1, x2, y2], width, height, placed) {
      const corners = [
        [x1, y1 - height], [x1, y2], [x2 - width, y1 - height], [x2 - width, y2], [x1, y1], [x2, y1], [x1 - width, y1],
        [x2, y2 - height], [x1 - width, y2 - height], [x1, y2 - height],
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
          place(hole, box.at);
          return hole;
        });
      const everything = [0, 0, this.width, this.height];
      const ground = draw("rect", { fill: "#fff" });
      const dark = draw("rect", { fill: "#000", "fill-opacity": 0.72, mask: `url(#${id})` });
      place(ground, everything);
      place(dark, everything);
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

  const area = ([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);

  function overlap(a, b) {
    const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
    const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
    return Math.max(0, width) * Math.max(0, height);
  }

  function place(shape, [x1, y1, x2, y2]) {
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
        make("div", { className: "vl-pictures" }, ...(this.pictures.length ? this.pictures.map((p) => p.element) : [this.explainNoPicture()])),
        make("div", { className: "vl-side" }, this.buildWords(), this.buildList()),
        this.lines
      );
    }

    explainNoPicture() {
      const blind = !this.source.doc.images.length;
      const text = blind ? "This run reads the words alone: there is no picture side." : "The detector found no region.";
      const image = this.source.doc.images[0];
      return make(
        "div",
        { className: "vl-none" },
        image ? make("img", { src: image.src, alt: "The picture, without regions" }) : null,
        make("p", { textContent: text })
      );
    }

    buildWords() {
      this.words = this.units.map((unit, index) =>
        make(
          "button",
          { type: "button", className: unit.special ? "vl-word vl-special" : "vl-word", "data-kind": "words", "data-index": index, tabIndex: -1 },
          make("span", { textContent: unit.text }),
          make("small", {})
        )
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
        apart.length ? make("div", { className: "vl-apart" }, make("span", { textContent: "apart" }), ...apart) : null
      );
    }

    buildList() {
      this.items = this.row.regions.map((region, index) => {
        const bar = make("span", { className: "vl-bar" }, make("i", {}));
        return make(
          "button",
          { type: "button", className: region.special ? "vl-item vl-special" : "vl-item", "data-kind": "regions", "data-index": index, tabIndex: -1 },
          make("span", { className: "vl-name", textContent: region.name }),
          bar,
          make("span", { className: "vl-number" })
        );
      });
      if (this.items.length) this.items[0].tabIndex = 0;
      this.list = make("div", { className: "vl-list", role: "group", "aria-label": "Boxes, strongest first" }, ...this.items);
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
      this.paintLines(selection, scale);
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
        element.classList.toggle("vl-crossed", crossed.has(n));
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
      if (this.list.matches(":hover") || this.list.contains(document.activeElement)) return;
      const order = values ? this.sort(values) : this.items.map((_, n) => n);
      if (order.some((n, place) => this.list.children[place] !== this.items[n])) {
        this.list.replaceChildren(...order.map((n) => this.items[n]));
        this.items.forEach((item, n) => (item.tabIndex = n === order[0] ? 0 : -1));
      }
    }

    /** Regions by value, what is no detected region behind them. */
    sort(values) {
      const { regions } = this.row;
      return values.map((_, n) => n).sort((a, b) => regions[a].special - regions[b].special || values[b] - values[a] || a - b);
    }

    /** The chosen heads as lines: of what is selected, or the strongest of all. */
    paintLines(selection, scale) {
      const { state } = this.controller;
      if (!state.lines || state.show !== "attention") return this.lines.replaceChildren();
      const frame = this.element.getBoundingClientRect();
      const { from, to } = DIRECTIONS[state.direction];
      const links = this.links(selection).slice(0, MOST_LINES);
      const paths = [];
      for (const { start, end, weight } of links) {
        const a = this.anchor(from, start, frame);
        const b = this.anchor(to, end, frame);
        if (!a || !b) continue;
        const strength = clamp(weight / scale, 0, 1);
        const bend = from === to ? -40 - Math.abs(a[0] - b[0]) / 6 : 0;
        const path = `M${a} C${[(2 * a[0] + b[0]) / 3, a[1] + bend]} ${[(a[0] + 2 * b[0]) / 3, b[1] + bend]} ${b}`;
        const look = { d: path, "stroke-width": 1 + 3 * strength, "stroke-opacity": 0.15 + 0.85 * strength };
        paths.push(draw("path", { ...look, class: "vl-line-halo" }), draw("path", { ...look, stroke: this.view.palette.hue(1) }));
      }
      this.lines.replaceChildren(...paths);
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
            ? (selection.kind === from && selection.index === start) || (selection.kind === to && from !== to && selection.index === end)
            : !special[from][start].special && !special[to][end].special;
          if (!chosen || (from === to && start === end)) return;
          found.push({ start, end, weight: sum(rows, (m) => sum(columns, (n) => map.weights[m * map.to + n])) / rows.length });
        });
      });
      return found.filter(({ weight }) => weight > 0).sort((a, b) => b.weight - a.weight);
    }

    /** Where a line starts or ends, from the corner of this block. */
    anchor(kind, index, frame) {
      if (kind === "words") {
        const at = this.words[index].getBoundingClientRect();
        return [at.left + at.width / 2 - frame.left, at.top - frame.top + 2];
      }
      for (const picture of this.pictures) {
        const middle = picture.middle(index);
        if (!middle) continue;
        const corner = picture.svg.getBoundingClientRect();
        return [corner.left - frame.left + middle[0], corner.top - frame.top + middle[1]];
      }
      return null;
    }

    elementOf(kind, index) {
      return (kind === "words" ? this.words : this.items)[index];
    }

    nameOf(kind, index) {
      return kind === "words" ? this.units[index].text : this.row.regions[index].name;
    }

    destroy() {
      for (const picture of this.pictures) picture.observer.disconnect();
    }
  }
