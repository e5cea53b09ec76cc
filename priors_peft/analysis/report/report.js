"use strict";

// Tables sort by their columns' headings.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      // What was not measured comes last, whichever way.
      if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}

const figures = JSON.parse(document.getElementById("figures").textContent);

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function draw(place) {
  const { data, layout } = figures[place.dataset.figure];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = { ...layout };
  for (const key of Object.keys(layout).concat("xaxis", "yaxis")) {
    if (/^[xy]axis/.test(key)) themed[key] = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), ...layout[key] };
  }
  const legend = data.filter((trace) => trace.showlegend !== false && trace.name).length > 1;
  Plotly.react(place, data, {
    margin: { l: 60, r: 20, t: 15 + (legend ? 30 : 0) + (layout.annotations ? 35 : 0), b: 50 },
    showlegend: legend,
    paper_bgcolor: "rgba(0, 0, 0, 0)",
    plot_bgcolor: "rgba(0, 0, 0, 0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("--ink"), size: 12 },
    legend: { orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top" },
    hoverlabel: { namelength: -1 },
    hovermode: "closest",
    ...themed,
  }, { displaylogo: false, responsive: true, typesetMath: false });
  place.dataset.drawn = "yes";
}

// What lies in a closed part of the page has no width yet: it is drawn when it is opened.
const visible = (place) => !place.closest("details:not([open])");
const drawVisible = () => {
  for (const place of document.querySelectorAll(".figure:not([data-drawn])")) if (visible(place)) draw(place);
};

// Kinds of points are shown and hidden together.
for (const box of document.querySelectorAll(".kinds input")) {
  box.addEventListener("change", () => {
    const place = document.querySelector(`.figure[data-figure="${box.dataset.figure}"]`);
    const traces = figures[place.dataset.figure].data.flatMap((trace, index) => (trace.meta === box.value ? [index] : []));
    for (const index of traces) figures[place.dataset.figure].data[index].visible = box.checked;
    Plotly.restyle(place, { visible: box.checked }, traces);
  });
}

loadPlotly().then(() => {
  for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", drawVisible);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const place of document.querySelectorAll(".figure[data-drawn]")) draw(place);
  });
  drawVisible();
  document.documentElement.dataset.ready = "yes";
}, (error) => {
  for (const place of document.querySelectorAll(".figure")) {
    place.textContent = "This figure could not be drawn: " + error.message + ". It needs a browser of 2023 or later.";
  }
});
