"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const hidden = { rescorer: new Set(), p: new Set() };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]] };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(layout) {
    const ink = colour("--ink"), soft = colour("--soft"), grid = colour("--grid"), ground = colour("--ground");
    const axes = {};
    for (const name of ["xaxis", "yaxis"]) {
      axes[name] = {
        ...layout[name], title: { ...(layout[name] || {}).title, font: { size: 12 } }, gridcolor: grid, linecolor: grid, zerolinecolor: colour("--faint"), color: soft, tickcolor: grid,
      };
    }
    return {
      ...layout, ...axes, paper_bgcolor: ground, plot_bgcolor: ground,
      hoverdistance: 12,
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 12, color: ink },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: ink }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--faint"), activecolor: colour("--accent") },
    };
  }

  function shown(trace) {
    const meta = trace.meta;
    return !meta || !(hidden.rescorer.has(meta.rescorer) || hidden.p.has(meta.p));
  }

  // The library is text until the first chart is near, so that the page opens without waiting for it.
  function withLibrary() {
    if (window.Plotly) return;
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  }

  function draw(plot) {
    withLibrary();
    const figure = figures[plot.dataset.figure];
    const data = figure.data.map((trace) => ({ ...trace, visible: shown(trace) }));
    plot.dataset.drawn = "yes";
    return Plotly.react(plot, data, themed(figure.layout), config);
  }

  const redraw = () => Promise.all(plots.filter((plot) => plot.dataset.drawn).map(draw));

  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !target.dataset.drawn) { watcher.unobserve(target); draw(target); }
    }
  }, { rootMargin: "300px" });
  plots.forEach((plot) => watcher.observe(plot));

  for (const box of document.querySelectorAll("#legend input")) {
    box.addEventListener("change", () => {
      const [kind, value] = box.dataset.p ? ["p", Number(box.dataset.p)] : ["rescorer", box.dataset.rescorer];
      hidden[kind][box.checked ? "delete" : "add"](value);
      redraw();
    });
  }
  dark.addEventListener("change", redraw);

  // Paper is light and narrow, and shows charts that were never scrolled to.
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    for (const plot of plots) { draw(plot); Plotly.Plots.resize(plot); }
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    for (const plot of plots) { draw(plot); Plotly.Plots.resize(plot); }
  });
})();
