/* The reader's choice of light or dark, set before the first paint. Without one, the system's holds. */
"use strict";
(() => {
  try {
    const chosen = localStorage.getItem("visling-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // A browser that keeps nothing: the system's theme holds.
  }
})();
