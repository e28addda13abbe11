// The search page: sections by words, titles first; the start of a word and one wrong letter are enough. Works from file:// too.
(() => {
  const { sections, words } = window.SECTIONS;
  const DEFINED = 1000;  // added to the count where a section defines the name
  const vocabulary = Object.keys(words);
  const HAN = /[\u4e00-\u9fff]/;
  // words; of Chinese, which has no spaces, each two signs that stand together (tools/finish.py does the same)
  const split = (text) => (text.toLowerCase().match(/[\u4e00-\u9fff]+|(?:(?![\u4e00-\u9fff])[\p{L}\p{N}])+/gu) || [])
    .flatMap((w) => (HAN.test(w) && w.length > 1 ? [...w].slice(1).map((c, i) => w[i] + c) : [w]));
  const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const titles = sections.map(([, page, title]) => [split(page), split(title)]);
  // chapters explain; the glossary, the reference and the other appendices are for looking up, and so is what is left of a module
  const place = sections.map(([address]) => (/A7_\w+\.html#|api\/|#the-rest-of-the-module/.test(address) ? 0.45 : /nbs\/A|^index/.test(address) ? 0.75 : 1));

  const CHINESE = sections.map(([address]) => address.startsWith("zh/"));  // an English query is for the English pages

  // 0, 1 or 2: letters added, lost, changed or swapped between two words, at most 2
  const distance = (a, b) => {
    if (Math.abs(a.length - b.length) > 2) return 3;
    let before = null, above = [...Array(b.length + 1).keys()];
    for (let i = 1; i <= a.length; i++) {
      const row = [i];
      for (let j = 1; j <= b.length; j++) {
        row[j] = Math.min(row[j - 1] + 1, above[j] + 1, above[j - 1] + (a[i - 1] !== b[j - 1]));
        if (before && i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1);
      }
      [before, above] = [above, row];
    }
    return above[b.length];
  };

  const STEM = 0.7;
  const stem = (word) => word.replace(/(ing|ings|ed|es|e|s)$/, "");

  // how well a word of the book answers a word of the query: 1 the same, less for its beginning, least for a slip
  const near = (word, asked) => {
    if (word === asked) return 1;
    if (word === `${asked}s` || asked === `${word}s`) return 0.9;
    if (asked.length > 1 && word.startsWith(asked)) return 0.5;
    if (asked.length > 3 && stem(asked) === stem(word)) return STEM;
    return 0;
  };
  const matches = (asked) => {
    const found = new Map();
    let begun = false;  // the word itself, or one that begins with it; "forgeting" shares its stem with "forgets" and is a slip
    for (const word of vocabulary) {
      const s = near(word, asked);
      if (s) found.set(word, s);
      begun ||= s > 0 && s !== STEM;
    }
    if (begun || asked.length < 4) return found;
    for (const slips of [1, 2]) {
      for (const word of vocabulary) if (word.length > 3 && !found.has(word) && distance(word, asked) <= slips) found.set(word, 0.3 / slips);
      if (found.size) break;
    }
    return found;
  };

  const rare = (word) => Math.log(1 + sections.length / (words[word].length / 2));
  const find = (query) => {
    const asked = split(query), scores = new Float64Array(sections.length), hits = new Uint8Array(sections.length), used = new Set();
    for (const word of asked) {
      const best = new Float64Array(sections.length);
      for (const [known, weight] of matches(word)) {
        used.add(known);
        const at = words[known], rarity = rare(words[word] ? word : known);
        for (let i = 0; i < at.length; i += 2) best[at[i]] = Math.max(best[at[i]], weight * (rarity * (1 + Math.log(at[i + 1] % DEFINED + 1)) / 2 + (asked.length === 1 && at[i + 1] >= DEFINED ? 6 : 0)));
        titles.forEach(([page, title], i) => {
          const part = title.includes(known) ? 10 / Math.sqrt(title.length + 1) : 0, whole = page.includes(known) ? (sections[i][2] ? 1 : 9 / Math.sqrt(page.length)) : 0;
          if (part || whole) best[i] = Math.max(best[i], weight * (5 + part + whole));
        });
      }
      best.forEach((s, i) => { scores[i] += s * (CHINESE[i] && !HAN.test(query) ? 0.3 : place[i]); hits[i] += s > 0; });
    }
    const order = [...scores.keys()].filter((i) => hits[i] === Math.max(1, asked.length) || (hits[i] && hits[i] >= asked.length - 1 && asked.length > 2));
    order.sort((a, b) => hits[b] - hits[a] || scores[b] - scores[a] || a - b);
    return { order: order.slice(0, 40), used };
  };

  const marked = (text, used) => escape(text).replace(/[\p{L}\p{N}]+/gu, (w) => (used.has(w.toLowerCase()) ? `<mark>${w}</mark>` : w));
  const snippet = (text, used) => {
    const all = text.split(" "), at = Math.max(0, all.findIndex((w) => split(w).some((x) => used.has(x))) - 8);
    return (at ? "… " : "") + marked(all.slice(at, at + 32).join(" "), used) + (at + 32 < all.length ? " …" : "");
  };
  const show = (query) => {
    const box = document.getElementById("search-results");
    if (!query.trim()) { box.innerHTML = ""; return; }
    const { order, used } = find(query);
    const item = (i) => {
      const [address, page, title, text] = sections[i];
      return `<li><a href="${escape(address)}">${marked(page, used)}${title ? ` › ${marked(title, used)}` : ""}</a><p>${snippet(text, used)}</p></li>`;
    };
    box.innerHTML = order.length ? `<p>${order.length === 40 ? "The best 40" : order.length} sections</p><ol>${order.map(item).join("")}</ol>`
      : `<p>No section has these words. Try fewer of them, or look into the <a href="nbs/A7_glossary.html">glossary</a>.</p>`;
  };

  // the page has a field of its own; before it stands that of the dialog, which is hidden
  const field = document.querySelector("main input[name=q]") || document.querySelector("input[name=q]");
  const query = new URLSearchParams(location.search).get("q") || "";
  window.findSections = (q) => find(q).order.map((i) => sections[i]);  // the tests ask it
  const form = field.closest("form");
  form.addEventListener("submit", (e) => { e.preventDefault(); show(field.value); });
  field.addEventListener("input", () => {
    show(field.value);
    // the way back from a result leads to what was asked last
    try { history.replaceState(null, "", `?q=${encodeURIComponent(field.value)}`); } catch { /* a page from the disk may not */ }
  });
  field.value = query;
  field.focus();
  show(query);
})();
