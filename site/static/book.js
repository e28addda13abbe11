// "Show all code": one switch for every folded cell, remembered; boxes that scroll are for the keyboard too. Works from file://.
(() => {
  const KEY = "ftbook-code";
  const folds = () => document.querySelectorAll("div.cell details, details.code-fold");
  const remembered = () => { try { return localStorage.getItem(KEY) === "all"; } catch { return false; } };
  const keep = (all) => { try { localStorage.setItem(KEY, all ? "all" : "some"); } catch { /* private window */ } };

  const start = () => {
    const title = document.querySelector("article section h1, h1.title");
    if (!title || !folds().length) return;
    let all = remembered();
    const button = document.createElement("button");
    button.type = "button";
    button.className = "code-switch";
    const apply = () => {
      for (const fold of folds()) fold.open = all;
      button.textContent = all ? "Hide folded code" : "Show all code";
      button.setAttribute("aria-pressed", String(all));
    };
    button.addEventListener("click", () => { all = !all; keep(all); apply(); });
    title.insertAdjacentElement("afterend", button);
    if (all) apply(); else { button.textContent = "Show all code"; button.setAttribute("aria-pressed", "false"); }
  };
  // what scrolls inside its box can be reached and scrolled with the keyboard
  const reach = () => {
    for (const box of document.querySelectorAll("article pre, article table, article .formula")) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0; else box.removeAttribute("tabindex");
    }
    for (const formula of document.querySelectorAll("article span.math")) {
      formula.classList.remove("wide");
      const box = formula.closest("p, li, td, th, dd, figcaption");
      if (box && formula.getBoundingClientRect().right > box.getBoundingClientRect().right + 1) formula.classList.add("wide");
    }
  };
  addEventListener("load", reach);
  addEventListener("resize", reach);

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
