// Markdown as DOM nodes. Text of a model never becomes HTML: marked only cuts it into tokens, and every node is made
// here. Raw HTML is shown as the text that it is, pictures are not fetched, links lead to web and mail addresses only.

import { copyButton } from "./clipboard.js";
import { element } from "./dom.js";
import { lexer } from "./vendor/marked.js";

const LONGEST = 200_000; // characters; more is shown as plain text
const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };

/** Shows a text that grows. Only blocks that changed are made again, so a selection in the others stays. */
export class MarkdownView {
  constructor(container) {
    this.#container = container;
  }

  #container;
  #shown = []; // source of each block

  update(text) {
    const tokens = blocksOf(text);
    let same = 0;
    while (same < tokens.length && same < this.#shown.length && tokens[same].raw === this.#shown[same]) same += 1;
    while (this.#container.childNodes.length > same) this.#container.lastChild.remove();
    for (const token of tokens.slice(same)) this.#container.append(guarded(token));
    this.#shown = tokens.map((token) => token.raw);
  }
}

function blocksOf(text) {
  if (text.length <= LONGEST) {
    try {
      return lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
    } catch {
      // too deeply nested: it is shown as it stands
    }
  }
  return [{ type: "plain", raw: text }];
}

function guarded(token) {
  try {
    return block(token);
  } catch {
    return plain(token);
  }
}

const plain = (token) => element("p", { class: "plain" }, token.raw);

/** One node for a block. */
function block(token) {
  switch (token.type) {
    case "heading": // the page's own h1 comes first
      return element(`h${Math.min(token.depth + 1, 6)}`, {}, ...inlines(token.tokens));
    case "paragraph":
      return element("p", {}, ...inlines(token.tokens));
    case "text":
      return element("p", {}, ...inlines(token.tokens ?? [token]));
    case "code":
      return code(token);
    case "blockquote":
      return element("blockquote", {}, ...blocks(token.tokens));
    case "list":
      return element(
        token.ordered ? "ol" : "ul",
        { start: token.ordered && token.start !== 1 && token.start },
        ...token.items.map(item),
      );
    case "table":
      return table(token);
    case "hr":
      return element("hr");
    default: // HTML, and whatever else there may be
      return plain(token);
  }
}

const blocks = (tokens) => tokens.filter((token) => token.type !== "space" && token.type !== "def").map(block);

function item(entry) {
  const content = entry.tokens.flatMap((token) => {
    if (token.type === "checkbox") return [];
    if (token.type === "text") return inlines(token.tokens ?? [token]); // a tight list has no paragraphs
    return token.type === "space" ? [] : [block(token)];
  });
  const mark = entry.task ? [entry.checked ? "\u2611 " : "\u2610 "] : [];
  return element("li", {}, ...mark, ...content);
}

function table(token) {
  const cell = (tag) => (one, column) =>
    element(tag, { class: token.align[column] && `to-${token.align[column]}` }, ...inlines(one.tokens));
  const row = (tag) => (cells) => element("tr", {}, ...cells.map(cell(tag)));
  return element(
    "div",
    { class: "wide", tabindex: 0, role: "group", "aria-label": "Table" },
    element("table", {}, element("thead", {}, row("th")(token.header)), element("tbody", {}, ...token.rows.map(row("td")))),
  );
}

function code(token) {
  const language = (token.lang ?? "").split(/\s/)[0];
  return element(
    "figure",
    { class: "code" },
    element("figcaption", {}, element("span", {}, language || "code"), copyButton(() => token.text)),
    element("pre", { tabindex: 0, "aria-label": "Code" }, element("code", {}, token.text)),
  );
}

function inlines(tokens) {
  return tokens.map((token) => {
    switch (token.type) {
      case "strong":
      case "em":
      case "del":
        return element(token.type, {}, ...inlines(token.tokens));
      case "codespan":
        return element("code", {}, token.text);
      case "br":
        return element("br");
      case "link":
        return link(token.href, inlines(token.tokens), token.raw);
      case "image":
        return link(token.href, [`Picture: ${token.text || token.href}`], token.raw);
      case "text":
        return token.tokens ? element("span", {}, ...inlines(token.tokens)) : unescaped(token.raw);
      case "escape":
        return token.text;
      default:
        return token.raw;
    }
  });
}

function link(address, content, source) {
  if (!SAFE_LINK.test(address)) return source;
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...content);
}

const unescaped = (text) => text.replace(/&(amp|lt|gt|quot|#39|nbsp);/g, (entity) => ENTITIES[entity]);
