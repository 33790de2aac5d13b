// Pictures as a few SVG paths each: the style sheet colours them, so they follow the theme by themselves.

const SVG = "http://www.w3.org/2000/svg";

/** A picture of `width` x `height` units that fills its place, with one path for each class in `layers`. */
export class Picture {
  constructor(width, height, layers, { stretch = true } = {}) {
    this.width = width;
    this.height = height;
    this.node = document.createElementNS(SVG, "svg");
    this.node.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.node.setAttribute("role", "img");
    if (stretch) this.node.setAttribute("preserveAspectRatio", "none");
    for (const layer of layers) {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", layer);
      this.#paths.set(layer, path);
      this.node.append(path);
    }
  }

  #paths = new Map();

  draw(layer, outline) {
    this.#paths.get(layer).setAttribute("d", outline);
  }

  /** What screen readers say of it. */
  describe(text) {
    this.node.setAttribute("aria-label", text);
  }

  resize(width, height) {
    this.node.setAttribute("viewBox", `0 0 ${width} ${height}`);
  }
}

const short = (number) => +number.toFixed(2);

/** Rectangles [x, y, width, height]. */
export function rectangles(list) {
  return list.map(([x, y, width, height]) => `M${short(x)} ${short(y)}h${short(width)}v${short(height)}h${short(-width)}z`).join("");
}

/** A line through points [x, y]. */
export function line(points) {
  return points.map(([x, y], index) => `${index ? "L" : "M"}${short(x)} ${short(y)}`).join("");
}

/** What lies between a line and the bottom. */
export function area(points, bottom) {
  if (!points.length) return "";
  return `${line(points)}L${short(points.at(-1)[0])} ${bottom}L${short(points[0][0])} ${bottom}z`;
}

/** The next number that is round enough for the top of an axis and not below `value`. */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((digit) => digit * power).find((top) => top >= value * 0.999);
}

/** How many of `cells` each part gets, at least one for a part that is not empty. Parts sum to `total`. */
export function shareOut(parts, total, cells) {
  const given = parts.map((part) => (part ? Math.max(1, Math.round((part / total) * cells)) : 0));
  const largest = given.indexOf(Math.max(...given));
  given[largest] += cells - given.reduce((sum, count) => sum + count, 0);
  return given;
}
