// Draws the charts, and draws them again when the theme changes or the page is printed.
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const config = { displayModeBar: false, responsive: true, showTips: false };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const print = matchMedia("print");

  // "var(--ink)" anywhere in a specification becomes what the style sheet says now.
  function resolve(value, styles) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? styles.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolve(item, styles));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, styles)]));
  }

  function draw(width) {
    const styles = getComputedStyle(document.documentElement);
    for (const [id, spec] of Object.entries(specs)) {
      const figure = document.getElementById(id);
      const { data, layout } = resolve(spec, styles);
      layout.width = width || figure.clientWidth;
      layout.height = Number(figure.dataset.height);
      // On a narrow screen the legend takes a second line.
      if (layout.width < 600) layout.margin = { ...layout.margin, t: layout.margin.t + 24 };
      Plotly.react(figure, data, layout, config);
    }
  }

  // Paper is about 680 CSS pixels wide between its margins.
  const redraw = () => draw(print.matches ? 680 : undefined);
  dark.addEventListener("change", redraw);
  print.addEventListener("change", redraw);
  addEventListener("resize", redraw);
  redraw();
})();
