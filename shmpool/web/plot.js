// A plot over time as SVG: lines or stacked areas, on a linear or a logarithmic axis.
//
// Where there is no value, or no sample for longer than GAP periods, the line has a gap: nothing is drawn between. A
// value alone between two gaps is a dot. All plots of a page share the moment that the pointer is on.
// Every text goes in as textContent.

const GAP = 2.5;
const MARGIN = { left: 52, right: 10, top: 8, bottom: 20 };
const STEPS = [10, 30, 60, 120, 300]; // seconds between two ticks of the time axis
const DOT = "m-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0";

export function element(tag, cls = "", text = "") {
  const made = document.createElement(tag);
  made.className = cls;
  made.textContent = text;
  return made;
}

function shape(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// title; unit; series: [{name, cls, of(point), area, dash, step}], areas from the bottom up; show(value) as text;
// log: the axis has a decade per line; height in pixels; whole: no line of the grid between whole numbers.
export class Plot {
  static all = [];
  static hover = null; // a time, or null

  constructor(parent, options) {
    Object.assign(this, { height: 150, log: false, whole: false, unit: "" }, options);
    this.points = [];
    const head = element("div", "head");
    const title = element("h2", "", this.title);
    if (this.unit) title.append(" ", element("small", "", this.unit));
    this.legend = element("div", "legend");
    head.append(title, this.legend);
    this.svg = shape("svg", { height: this.height, role: "img", "aria-label": this.title });
    this.tip = element("div", "tip");
    this.tip.hidden = true;
    this.grid = shape("g", {});
    this.paths = this.series.map((each) =>
      shape("path", { class: `series ${each.cls}${each.area ? " area" : ""}${each.dash ? " dash" : ""}` }));
    this.hair = shape("path", { class: "hair" });
    this.svg.append(this.grid, ...this.paths, this.hair);
    parent.append(head, this.svg, this.tip);
    this.box = parent;
    this.values = this.series.map((each) => {
      const item = element("span");
      const value = document.createTextNode("");
      item.append(element("i", each.cls), `${each.name} `, value);
      this.legend.append(item);
      return value;
    });
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => Plot.at(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
    Plot.all.push(this);
  }

  // Points in the order of their time; `period` seconds apart, usually; the axis is [from, to], in seconds.
  set(points, period, from, to) {
    Object.assign(this, { points, period, from, to });
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!width || this.to === undefined) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.width = width;
    this.tops = this.stacked();
    this.scale();
    this.drawGrid();
    this.series.forEach((each, at) => this.paths[at].setAttribute("d", this.path(each, at)));
    const newest = this.points.at(-1);
    this.series.forEach((each, at) => { this.values[at].data = this.text(newest && each.of(newest)); });
    this.drawHover();
  }

  text(value) {
    return value === null || value === undefined ? "–" : this.show(value);
  }

  // For each series the height of each point: of areas the sum with those below.
  stacked() {
    const sums = this.points.map(() => 0);
    return this.series.map((each) => this.points.map((point, at) => {
      const value = each.of(point);
      if (value === null || value === undefined) return null;
      return each.area ? (sums[at] += value) : value;
    }));
  }

  scale() {
    const seen = this.points.map((point) => point.time >= this.from);
    const values = this.tops.flatMap((tops) => tops.filter((top, at) => seen[at] && top !== null && (!this.log || top > 0)));
    this.empty = values.length === 0;
    const most = values.reduce((a, b) => Math.max(a, b), 0);
    if (this.log) {
      const low = this.empty ? -6 : Math.floor(Math.log10(values.reduce((a, b) => Math.min(a, b))));
      const high = this.empty ? -3 : Math.max(low + 1, Math.ceil(Math.log10(most)));
      this.ticks = Array.from({ length: high - low + 1 }, (_, at) => 10 ** (low + at));
      this.part = (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low);
    } else {
      const step = niceStep(most / 4, this.whole);
      const high = Math.max(1, Math.ceil(most / step - 1e-9)) * step;
      this.ticks = Array.from({ length: Math.round(high / step) + 1 }, (_, at) => at * step);
      this.part = (value) => value / high;
    }
  }

  x(time) {
    return MARGIN.left + (time - this.from) / (this.to - this.from) * (this.width - MARGIN.left - MARGIN.right);
  }

  y(value) {
    const bottom = this.height - MARGIN.bottom;
    return bottom - this.part(value) * (bottom - MARGIN.top);
  }

  drawGrid() {
    const right = this.width - MARGIN.right, bottom = this.height - MARGIN.bottom, made = [];
    const every = Math.max(1, Math.ceil(this.ticks.length * 14 / (bottom - MARGIN.top)));
    this.ticks.forEach((tick, at) => {
      const y = this.y(tick);
      made.push(shape("path", { class: "grid", d: `M${MARGIN.left} ${y}H${right}` }));
      if (at % every === 0) {
        made.push(shape("text", { class: "end", x: MARGIN.left - 6, y: y + 4 }, this.show(tick)));
      }
    });
    const fits = Math.max(2, Math.floor((right - MARGIN.left) / 70));
    const step = STEPS.find((each) => (this.to - this.from) / each <= fits) ?? STEPS.at(-1);
    for (let time = Math.ceil(this.from / step) * step; time <= this.to; time += step) {
      const x = this.x(time), label = Math.min(Math.max(x, MARGIN.left + 12), right - 22);
      made.push(shape("path", { class: "grid", d: `M${x} ${bottom}v4` }));
      made.push(shape("text", { class: "middle", x: label, y: this.height - 4 }, clock(time, step < 60)));
    }
    if (this.empty) {
      const middle = { class: "middle", x: (MARGIN.left + right) / 2, y: (MARGIN.top + bottom) / 2 + 4 };
      made.push(shape("text", middle, "no samples"));
    }
    this.grid.replaceChildren(...made);
  }

  // Runs of points that are to be joined, as lists of indices.
  runs(at) {
    const runs = [];
    let before = null;
    this.points.forEach((point, index) => {
      const there = point.time >= this.from && this.tops[at][index] !== null;
      if (there && before !== null && point.time - before <= GAP * this.period) runs.at(-1).push(index);
      else if (there) runs.push([index]);
      before = there ? point.time : null;
    });
    return runs;
  }

  path(series, at) {
    const place = (index, value) => `${this.x(this.points[index].time).toFixed(1)} ${this.y(value).toFixed(1)}`;
    const tops = this.tops[at];
    const below = series.area && at > 0 && this.series[at - 1].area ? this.tops[at - 1] : null;
    return this.runs(at).map((run) => {
      const line = run.map((index, nth) => {
        const level = series.step && nth ? `H${this.x(this.points[index].time).toFixed(1)}` : "";
        return `${level}${nth ? "L" : "M"}${place(index, tops[index])}`;
      }).join("");
      if (!series.area) return run.length > 1 ? line : `${line}${DOT}`;
      const back = [...run].reverse().map((index) => `L${place(index, below?.[index] ?? 0)}`).join("");
      return `${line}${back}Z`;
    }).join("");
  }

  point(event) {
    const inside = (event.offsetX - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    Plot.at(this.from + inside * (this.to - this.from), this);
  }

  static at(time, plot = null) {
    Plot.hover = time;
    Plot.under = plot;
    for (const each of Plot.all) each.drawHover();
  }

  // The hair of every plot; the values beside it of the one that the pointer is on.
  drawHover() {
    const time = Plot.hover;
    const near = time === null ? undefined : this.points.reduce((best, point) =>
      point.time >= this.from && Math.abs(point.time - time) < Math.abs((best?.time ?? Infinity) - time) ? point : best, undefined);
    const shown = near && Math.abs(near.time - time) <= Math.max(GAP * this.period, (this.to - this.from) / 100);
    const x = shown ? this.x(near.time) : 0;
    this.hair.setAttribute("d", shown ? `M${x.toFixed(1)} ${MARGIN.top}V${this.height - MARGIN.bottom}` : "");
    this.tip.hidden = !shown || Plot.under !== this;
    if (this.tip.hidden) return;
    this.tip.replaceChildren(element("b", "", clock(near.time, true)), ...this.series.map((each) => {
      const row = element("div"), name = element("span", "", each.name);
      name.prepend(element("i", each.cls));
      row.append(name, element("b", "", this.text(each.of(near))));
      return row;
    }));
    const box = this.box.getBoundingClientRect(), svg = this.svg.getBoundingClientRect();
    const left = svg.left - box.left + x;
    const room = this.box.clientWidth - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(4, Math.min(left + 12 > room ? left - 12 - this.tip.offsetWidth : left + 12, room))}px`;
    this.tip.style.top = `${svg.top - box.top + 8}px`;
  }
}

function niceStep(least, whole) {
  const power = 10 ** Math.floor(Math.log10(least || 1));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= least);
  return whole ? Math.max(1, Math.ceil(step)) : step;
}

export function clock(seconds, exact = true) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB", exact ? {} : { hour: "2-digit", minute: "2-digit" });
}
