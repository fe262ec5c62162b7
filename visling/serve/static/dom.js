/* The few ways in which the page touches its document. */

/** The element with an id of index.html. */
export const find = (id) => document.getElementById(id);

/** A new element: properties are set as they are; `class`, `data-*`, `aria-*`, `for` and `role` as attributes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (/^(class|for|role|colspan|scope|(data|aria)-.*)$/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Shows or hides an element. */
export const show = (element, shown = true) => {
  element.hidden = !shown;
};

/** A share in percent, as the linked view writes it. */
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

/** A score with two digits behind the point. */
export const decimal = (score) => score.toFixed(2).replace("-", "−");

/** A change of a share in points: "+12", "−3", "0". */
export function points(change) {
  const rounded = Math.round(change * 100);
  return rounded > 0 ? `+${rounded}` : rounded < 0 ? `−${-rounded}` : "0";
}
