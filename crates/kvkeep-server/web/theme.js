// Light, dark, or as the system has it. Not a module: it runs before the first paint, so that
// a chosen theme does not flash the other one.
{
  const THEMES = ["auto", "light", "dark"];
  const root = document.documentElement;
  const stored = localStorage.getItem("kvkeep-theme");
  root.dataset.theme = THEMES.includes(stored) ? stored : "auto";

  const show = (button) => (button.textContent = `Theme: ${root.dataset.theme}`);
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    show(button);
    button.addEventListener("click", () => {
      root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
      localStorage.setItem("kvkeep-theme", root.dataset.theme);
      show(button);
    });
  });
}
