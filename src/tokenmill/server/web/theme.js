// Light, dark, or as the system has it. A classic script in the head, so that no page flashes up in the wrong colours.
"use strict";

(() => {
  const NAMES = { auto: "as the system", light: "light", dark: "dark" };
  const ORDER = Object.keys(NAMES);
  const KEY = "tokenmill.theme";
  const root = document.documentElement;

  function show(theme) {
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    button?.setAttribute("aria-label", `Theme: ${NAMES[theme]}`);
    button?.setAttribute("title", `Theme: ${NAMES[theme]}`);
  }

  function stored() {
    const theme = localStorage.getItem(KEY);
    return ORDER.includes(theme) ? theme : "auto";
  }

  show(stored());
  document.addEventListener("DOMContentLoaded", () => {
    show(stored());
    document.getElementById("theme").addEventListener("click", () => {
      const next = ORDER[(ORDER.indexOf(stored()) + 1) % ORDER.length];
      localStorage.setItem(KEY, next);
      show(next);
    });
  });
})();
