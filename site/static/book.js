// "Show all code": one switch for every folded cell, remembered; boxes that scroll are for the keyboard too; tables sort; the glossary filters;
// questions are counted.
// Works from file://.
(() => {
  const KEY = "ftbook-code";
  const chinese = document.documentElement.lang.startsWith("zh");
  const said = (english, other) => (chinese ? other : english);
  const folds = () => document.querySelectorAll("div.cell details, details.code-fold, details.part");
  const remembered = () => { try { return localStorage.getItem(KEY) === "all"; } catch { return false; } };
  const keep = (all) => { try { localStorage.setItem(KEY, all ? "all" : "some"); } catch { /* private window */ } };

  const start = () => {
    const title = document.querySelector("article section h1, h1.title");
    if (!title || !folds().length) return;
    let all = remembered();
    const button = document.createElement("button");
    button.type = "button";
    button.className = "code-switch";
    const label = () => {
      button.textContent = all ? said("Hide folded code", "收起折叠的代码") : said("Show all code", "显示全部代码");
      button.setAttribute("aria-pressed", String(all));
    };
    const apply = () => {
      for (const fold of folds()) fold.open = all;
      label();
    };
    button.addEventListener("click", () => { all = !all; keep(all); apply(); });
    const promise = title.nextElementSibling?.matches("p") ? title.nextElementSibling : title;  // a page begins with what it is for
    promise.insertAdjacentElement("afterend", button);
    const exported = document.querySelector("div.cell.tag_export");
    if (exported) {
      const legend = document.createElement("p");
      legend.className = "code-legend";
      legend.textContent = said("A blue edge marks code that is exported: it is the library ftbook, word for word.", "蓝边标出会被导出的代码：它们就是 ftbook 库本身，一字不差。");
      button.insertAdjacentElement("afterend", legend);
    }
    if (all) apply(); else label();
  };
  // what scrolls inside its box can be reached and scrolled with the keyboard; a section far away is measured when it comes near
  const laid = (e) => !e.checkVisibility || e.checkVisibility({ contentVisibilityAuto: true });
  const reach = (where = document) => {
    const boxes = [...where.querySelectorAll("article pre, article table, article .formula, article figure.wide, main pre, main table")].filter(laid);
    const formulas = [...where.querySelectorAll("article span.math")].filter(laid);
    for (const formula of formulas) formula.classList.remove("wide");
    // all is measured before anything is changed: what is seen is laid out once
    const scroll = boxes.map((box) => box.scrollWidth > box.clientWidth + 1);
    const wide = formulas.map((formula) => {
      const box = formula.closest("p, li, td, th, dd, figcaption");
      return box && formula.getBoundingClientRect().right > box.getBoundingClientRect().right + 1;
    });
    boxes.forEach((box, i) => { if (scroll[i]) box.tabIndex = 0; else if (box.hasAttribute("tabindex")) box.removeAttribute("tabindex"); });
    formulas.forEach((formula, i) => { if (wide[i]) formula.classList.add("wide"); });
  };
  // a section that was never near has a guessed height; those measured last time bring a reload and the way back to the same place
  const heights = () => {
    const key = `ftbook-heights ${innerWidth} ${location.pathname}`;
    const sections = [...document.querySelectorAll(".bd-article > section > section[id]")];
    let known = {};
    try { known = JSON.parse(sessionStorage.getItem(key)) || {}; } catch { /* private window */ }
    for (const e of sections) if (known[e.id]) e.style.containIntrinsicBlockSize = `auto ${known[e.id]}px`;
    addEventListener("pagehide", () => {
      for (const e of sections) known[e.id] = e.getBoundingClientRect().height;
      try { sessionStorage.setItem(key, JSON.stringify(known)); } catch { /* private window */ }
    });
  };
  // a click on a column's head sorts: numbers as numbers (their first one counts), words as words
  const number = (text) => {
    const found = text.replace(/[\u2212\u2013]/g, "-").replace(/(\d)[,\u202f\u00a0](?=\d{3}\b)/g, "$1").match(/^(?:under |over )?[^\d\w]*?([-+]?\d*\.?\d+(?:e[-+]?\d+)?)/i);
    return found ? Number(found[1]) : NaN;
  };
  const sortable = (table) => {
    const body = table.tBodies[0], heads = [...(table.tHead?.rows[0]?.cells || [])];
    if (!body || body.rows.length < 4 || table.querySelector("[rowspan], [colspan]")) return;
    heads.forEach((head, column) => {
      const title = head.textContent.trim();
      if (!title || head.tagName !== "TH" || head.querySelector("a, math")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sorter";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending", rows = [...body.rows];
        const texts = new Map(rows.map((row) => [row, (row.cells[column]?.textContent || "").trim()]));
        const values = [...texts.values()].filter((t) => t && t !== "–" && t !== "-");
        const numeric = values.length > 0 && values.every((t) => !Number.isNaN(number(t)));
        const sign = down ? -1 : 1;
        const compare = (a, b) => {
          const [s, t] = [texts.get(a), texts.get(b)];
          if (!numeric) return sign * s.localeCompare(t);
          const [x, y] = [number(s), number(t)];
          return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y);  // what has no number is last in both orders
        };
        rows.sort(compare);
        body.append(...rows);
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
      });
    });
  };

  // the glossary: a box that keeps the terms with these letters, English or Chinese
  const filter = () => {
    const terms = [...document.querySelectorAll("article section > h3, main section.level3 > h3")].map((h) => h.parentElement);
    const title = document.querySelector("article section h1, h1.title");
    if (!/A7_glossary/.test(location.pathname) || !title || !terms.length) return;
    const box = document.createElement("div");
    box.className = "term-filter";
    box.innerHTML = '<label for="term-filter">Find a term, English or Chinese</label><input id="term-filter" type="search" autocomplete="off"><span role="status"></span>';
    (document.querySelector(".code-switch") || title).insertAdjacentElement("afterend", box);
    const field = box.querySelector("input"), status = box.querySelector("[role=status]");
    const words = terms.map((t) => t.textContent.toLowerCase()), names = terms.map((t) => `${t.querySelector("h3").textContent} ${t.querySelector("[lang=zh]")?.textContent || ""}`.toLowerCase());
    const letters = new Set(terms.map((t) => t.parentElement));
    field.addEventListener("input", () => {
      const asked = field.value.trim().toLowerCase();
      const named = names.map((n) => n.includes(asked)), any = named.some(Boolean);
      let kept = 0;
      terms.forEach((t, i) => { t.hidden = !(any ? named[i] : words[i].includes(asked)); kept += !t.hidden; });
      for (const letter of letters) letter.hidden = [...letter.querySelectorAll("section")].every((t) => t.hidden);
      status.textContent = asked ? `${kept} of ${terms.length} terms` : "";
    });
  };

  // a question is answered when its right choice was opened; the count stands above the first one and stays in this browser
  const quiz = () => {
    const key = `ftbook-quiz ${location.pathname.split("/").pop()}`;
    const asked = new Map(); // right choice -> the paragraph that asks
    for (const right of document.querySelectorAll("details.choice.right")) {
      let question = right;
      while (question?.matches("details.choice")) question = question.previousElementSibling;
      if (question) asked.set(right, question);
    }
    if (!asked.size) return;
    let done = [];
    try { done = JSON.parse(localStorage.getItem(key)) || []; } catch { /* private window */ }
    const answered = new Set([...asked.values()].map((q) => q.textContent).filter((text) => done.includes?.(text)));
    const count = document.createElement("p");
    count.className = "quiz-count";
    count.setAttribute("role", "status");
    const say = () => {
      for (const question of asked.values()) question.classList.toggle("answered", answered.has(question.textContent));
      count.textContent = `${answered.size} of ${asked.size} answered`;
    };
    for (const [right, question] of asked) {
      question.classList.add("question");
      right.addEventListener("toggle", () => {
        if (!right.open || answered.has(question.textContent)) return;
        answered.add(question.textContent);
        say();
        try { localStorage.setItem(key, JSON.stringify([...answered])); } catch { /* private window */ }
      });
    }
    say();
    [...asked.values()][0].before(count);
  };

  // a table or an output that shows its beginning shows all of it
  const unfold = (box, all = true) => {
    const button = box.nextElementSibling;
    box.classList.toggle("all", all);
    button.setAttribute("aria-expanded", String(all));
    const open = button.dataset.open ||= button.textContent;
    button.textContent = all ? said("Show the first ones only", "只显示开头") : open;
  };
  const unfolding = () => {
    for (const button of document.querySelectorAll("button.more")) {
      const box = button.previousElementSibling;
      button.addEventListener("click", () => { unfold(box, !box.classList.contains("all")); reach(box.parentElement); });
    }
  };
  // a link into what is folded, or to a folded section, opens it
  const reveal = (hash = location.hash) => {
    let place = null;
    try { place = hash.length > 1 && document.getElementById(decodeURIComponent(hash.slice(1))); } catch { /* half an escape */ }
    if (!place) return;
    const closed = [...place.querySelectorAll(":scope > details.part")];
    for (let e = place; e; e = e.parentElement) if (e.tagName === "DETAILS") closed.push(e);
    const row = place.closest("table.long:not(.all)");
    if (row) unfold(row);
    if (!row && closed.every((e) => e.open)) return;
    for (const e of closed) e.open = true;
    place.scrollIntoView();
  };
  const following = () => {
    reveal();
    addEventListener("hashchange", () => reveal());
    document.addEventListener("click", (event) => { // the same place once more: the address does not change
      const link = event.target.closest?.('a[href^="#"]');
      if (link && link.hash === location.hash) reveal(link.hash);
    });
  };

  // paper is white: a dark page is printed in the light theme
  const paper = () => {
    const root = document.documentElement;
    let theme = "";
    addEventListener("beforeprint", () => { theme ||= root.dataset.theme; root.dataset.theme = "light"; });
    addEventListener("afterprint", () => { if (theme) root.dataset.theme = theme; theme = ""; });
  };

  const enrich = () => { heights(); document.querySelectorAll("article table, main table").forEach(sortable); filter(); quiz(); paper(); unfolding(); following(); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", enrich); else enrich();
  addEventListener("load", () => setTimeout(reach)); // a task of its own, as each script is
  addEventListener("resize", () => reach());
  addEventListener("toggle", (event) => { if (event.target.open) reach(event.target); }, true);
  addEventListener("contentvisibilityautostatechange", (event) => { if (!event.skipped) reach(event.target); }, true);

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
