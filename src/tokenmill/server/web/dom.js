// Building elements without HTML strings.

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. Properties that are functions become listeners (`onclick`), `true` an attribute without a value, and
 * `false`, `null` and `undefined` are left out; everything else is an attribute. Children are nodes or text.
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") {
      made.addEventListener(name.slice("on".length), value);
    } else if (value !== false && value !== null && value !== undefined) {
      made.setAttribute(name, value === true ? "" : String(value));
    }
  }
  made.append(...children);
  return made;
}

/** Has screen readers say `text`. */
export function announce(text) {
  byId("announcer").textContent = text;
}
