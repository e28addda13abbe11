// The controls of a page choose among drawings made when the chapter ran (tools/filter.py, `playable`). No kernel, no request; works from file://.
(() => {
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const WIDE = 560, LEGIBLE = 0.6;  // as in tools/filter.py
  const make = (tag, text, attributes = {}) => {
    const node = document.createElement(tag);
    node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };

  const start = (box) => {
    const data = JSON.parse(box.querySelector("script").textContent);
    const stage = box.querySelector(".play-stage"), said = box.querySelector(".play-said"), panel = box.querySelector(".play-controls");
    const fields = data.controls.map((_, i) => box.querySelector(`[data-control="${i}"]`));
    const text = (ranges) => ranges.split(" ").map((range) => {
      const [from, to = from] = range.split("-").map(Number);
      return data.lines.slice(from, to + 1).join("\n");
    }).join("\n");

    const picture = (part) => {
      const figure = make("figure", "", { class: part.width > WIDE ? "plot wide" : "plot" });
      if (part.width > WIDE) figure.style.setProperty("--least", `${Math.round(LEGIBLE * part.width)}px`);
      const source = "svg" in part ? `data:image/svg+xml,${encodeURIComponent(text(part.svg))}` : part.image;
      figure.append(make("img", "", { src: source, alt: part.alt || "", width: part.width }));
      if (part.caption) figure.append(make("figcaption", part.caption));
      return figure;
    };
    const nodeOf = (part) => {
      if ("svg" in part || "image" in part) return picture(part);
      if ("text" in part) return make("pre", text(part.text));
      const node = make("div", "");
      node.innerHTML = text(part.html);
      return node;
    };

    let turn = 0;
    const show = async () => {
      const mine = ++turn;
      let at = 0;
      data.controls.forEach(({ values, slider }, i) => {
        const field = fields[i], k = field ? Number(field.value) : 0;
        at = at * values.length + k;
        if (!field || !slider) return;
        field.setAttribute("aria-valuetext", values[k]);
        field.closest(".play-control").querySelector(".play-value").textContent = values[k];
      });
      const nodes = data.frames[at].split(" ").filter(Boolean).map((n) => nodeOf(data.parts[n]));
      const images = nodes.flatMap((n) => [...n.querySelectorAll("img")]);
      await Promise.all(images.map((i) => i.decode().catch(() => {})));  // the old picture stays until the new one can be drawn
      if (mine !== turn) return;
      stage.style.minHeight = `${stage.offsetHeight}px`;  // nothing below jumps
      stage.replaceChildren(...nodes);
      said.textContent = images.map((i) => i.alt).join(" ") || stage.textContent;
      box.dataset.frame = String(at);
    };

    for (const field of fields) if (field) field.addEventListener("input", show);
    addEventListener("resize", () => { stage.style.minHeight = ""; });

    // one button lets the first slider run, for those who want things to move
    const slider = fields.find((field, i) => field && data.controls[i].slider && data.controls[i].values.length > 3);
    if (slider) {
      const button = make("button", "▶ Run", { type: "button", class: "play-run" });
      let timer = 0;
      const stop = () => { clearInterval(timer); timer = 0; button.textContent = "▶ Run"; };
      const step = () => {
        if (calm.matches) { stop(); return; }
        slider.value = String((Number(slider.value) + 1) % (Number(slider.max) + 1));
        show();
        if (slider.value === slider.max) stop();
      };
      button.addEventListener("click", () => {
        if (timer) { stop(); return; }
        if (slider.value === slider.max) { slider.value = "0"; show(); }
        timer = setInterval(step, 600);
        button.textContent = "◼ Stop";
      });
      slider.addEventListener("pointerdown", stop);
      slider.addEventListener("keydown", stop);
      const motion = () => { button.hidden = calm.matches; if (calm.matches) stop(); };
      calm.addEventListener("change", motion);
      motion();
      panel.append(button);
    }
    panel.hidden = false;
  };

  const all = () => document.querySelectorAll("div.play").forEach(start);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all); else all();
})();
