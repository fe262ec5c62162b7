/* Light or dark: the reader's choice, or without one the system's. It is set before the first paint. */
"use strict";

(() => {
  const KEPT = "visling-theme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  try {
    const chosen = localStorage.getItem(KEPT);
    if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  } catch {
    // A browser that keeps nothing: the system's theme holds.
  }

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const draw = () => button.setAttribute("aria-checked", String(isDark()));
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      draw();
      try {
        localStorage.setItem(KEPT, root.dataset.theme);
      } catch {
        // The choice holds for this page alone.
      }
    });
    system.addEventListener("change", draw);
    draw();
  });
})();
