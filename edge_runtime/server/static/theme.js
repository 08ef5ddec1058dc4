// Sets light or dark before the first paint, as chosen here or else by the system. Not a module, because modules run
// after the first paint.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    let chosen = null;
    try {
      chosen = localStorage.getItem("theme");
    } catch {
      // Storage is forbidden here; the system decides.
    }
    const theme = chosen === "light" || chosen === "dark" ? chosen : dark.matches ? "dark" : "light";
    document.documentElement.dataset.theme = theme;
    document.querySelector("meta[name=theme-color]").content = theme === "dark" ? "#161816" : "#faf9f6";
  };
  apply();
  dark.addEventListener("change", apply);
  addEventListener("theme", apply);
})();
