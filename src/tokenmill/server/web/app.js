// The page: what it shows of chat and engine, and its panels.

import { get } from "./api.js";
import { Chat } from "./chat.js";
import { announce, byId } from "./dom.js";
import { EngineView } from "./engine.js";

const VIEWS = ["chat", "engine"];
const chat = new Chat();
const engine = new EngineView();

function showView() {
  const view = VIEWS.find((name) => location.hash === `#/${name}`) ?? VIEWS[0];
  document.body.dataset.view = view;
  for (const name of VIEWS) byId(name).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (view === "engine") engine.start();
  else engine.stop();
  if (location.hash === "#prompt") byId("prompt").focus();
}

/** A panel that a button shows and hides. It closes with Escape, and with the event `done` where it covers the page. */
function panel(name) {
  const button = byId(`${name}-toggle`);
  const area = byId(name);
  const covers = () => getComputedStyle(area).position === "fixed";
  const show = (open) => {
    button.setAttribute("aria-expanded", String(open));
    area.classList.toggle("open", open);
    if (name === "settings") area.hidden = !open;
    if (open) area.querySelector("button, input, textarea").focus();
  };
  const close = () => {
    if (!area.contains(document.activeElement)) return show(false);
    show(false);
    button.focus();
  };
  button.addEventListener("click", () => show(button.getAttribute("aria-expanded") !== "true"));
  area.addEventListener("done", () => covers() && show(false));
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    close();
  });
  document.addEventListener("pointerdown", (event) => {
    if (covers() && !area.contains(event.target) && !button.contains(event.target)) show(false);
  });
}

let known = null;

/** Learns what is served, once it can be learnt. */
function introduce() {
  known ??= learn();
}

async function learn() {
  try {
    const [{ data }, props] = await Promise.all([get("v1/models"), get("props")]);
    byId("model").textContent = data[0].id;
    document.title = `${data[0].id} \u00b7 Tokenmill`;
    const defaults = props.default_generation_settings;
    chat.introduce(data[0].id, defaults.n_ctx, defaults.params);
  } catch (error) {
    known = null;
    announce(error.message);
    byId("model").textContent = error.message;
  }
}

panel("history");
panel("settings");
window.addEventListener("hashchange", showView);
document.addEventListener("newkey", introduce);
showView();
introduce();
