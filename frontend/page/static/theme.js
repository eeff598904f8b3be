// Runs before the first paint, so that a dark page does not flash light. A classic script: modules wait for the parser.
(() => {
  let theme = "auto";
  try {
    theme = JSON.parse(localStorage.getItem("tandem.settings") ?? "{}").theme ?? "auto";
  } catch {
    // Storage is blocked or broken: the system's own theme it is.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
