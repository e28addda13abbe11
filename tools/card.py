"""Draw the picture that a link to the book shows elsewhere: `python -m tools.card` writes site/static/card.png (1200 x 630)."""

from ftbook import plot, results

from .settings import ROOT, book

FILE = ROOT / "site" / "static" / "card.png"


def main() -> None:
    import matplotlib.pyplot as plt

    study = results.load_study("01_background", "photos")
    plot.use_style()
    figure = plt.figure(figsize=(12, 6.3), dpi=100, layout="none")
    figure.text(0.06, 0.80, book()["title"], fontsize=42, weight="bold", color=plot.INK)
    figure.text(0.06, 0.70, book()["subtitle"], fontsize=22, color=plot.INK)
    ax = figure.add_axes((0.09, 0.17, 0.58, 0.42))
    kinds = ("ImageNet", "random", "pixels")
    every = [study.rows("accuracy", inputs=kind) for kind in kinds]
    labels = [r["labels"] for r in every[0]]
    places = plot.spread([100 * rows[-1].mean for rows in every], gap=8)
    for kind, rows, place, color in zip(kinds, every, places, plot.palette, strict=False):
        ax.plot(labels, [100 * r.mean for r in rows], color=color, linewidth=4)
        name = kind if kind == "pixels" else f"{kind} features"
        ax.text(labels[-1] * 1.08, place, name, color=color, fontsize=20, va="center")
    ax.set(xscale="log", xticks=labels, xticklabels=labels)
    ax.minorticks_off()
    ax.tick_params(labelsize=17)
    ax.set_xlabel("labels per class, ants and bees", fontsize=18)
    ax.set_ylabel("test accuracy, %", fontsize=18)
    figure.savefig(FILE, dpi=100, metadata={"Software": None})
    print(f"card: wrote {FILE.relative_to(ROOT)}, {FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
