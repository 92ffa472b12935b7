// The chart: one row an agent, drawn on a canvas for the rows that can be seen; the names are elements over it.

const ROW = 28;
const HEAD = 30;

class Chart {
  constructor(state, choose) {
    this.state = state;
    this.choose = choose;
    this.scroller = $("scroller");
    this.canvas = $("canvas");
    this.axisCanvas = $("axis-canvas");
    this.rows = [];
    this.range = [0, 1];
    this.shown = new Map();
    this.all = false;
    this.draw = later(() => this.drawNow());
    this.scroller.addEventListener("scroll", this.draw, { passive: true });
    new ResizeObserver(this.draw).observe(this.scroller);
    this.scroller.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.scroller.addEventListener("mousemove", (event) => this.hover(event));
    this.scroller.addEventListener("mouseleave", () => this.tip(null));
    this.scroller.addEventListener("click", (event) => this.click(event));
    this.drag();
  }

  /** Show other rows, or the same on another axis. */
  show(rows, { fit = false } = {}) {
    this.rows = rows;
    if (fit) this.range = [0, this.total()];
    for (const element of this.shown.values()) element.remove();
    this.shown.clear();
    $("rows").style.height = `${rows.length * ROW}px`;
    $("nothing").hidden = rows.length > 0;
    this.drawNow();
  }

  total() {
    return this.state.episode.length[this.state.axis] || 1;
  }

  /** Left edge and width of the bars, in pixels. */
  lane() {
    const width = this.scroller.clientWidth;
    const names = width < 560 ? Math.round(width * 0.36) : Math.min(280, Math.round(width * 0.36));
    return [names, Math.max(40, width - names - 14)];
  }

  x(value) {
    const [left, width] = this.lane();
    return left + ((value - this.range[0]) / (this.range[1] - this.range[0])) * width;
  }

  zoom(factor, x = null) {
    const [left, width] = this.lane();
    const share = x === null ? 0.5 : Math.min(1, Math.max(0, (x - left) / width));
    const span = this.range[1] - this.range[0];
    const wanted = Math.min(this.total(), Math.max(this.total() / 5000, span / factor));
    this.pan(this.range[0] + (span - wanted) * share, wanted);
  }

  pan(from, span = this.range[1] - this.range[0]) {
    const start = Math.min(Math.max(0, from), this.total() - span);
    this.range = [start, start + span];
    this.draw();
  }

  wheel(event) {
    const [, width] = this.lane();
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 300), event.clientX - this.scroller.getBoundingClientRect().left);
    } else if (event.deltaX) {
      this.pan(this.range[0] + (event.deltaX / width) * (this.range[1] - this.range[0]));
    }
  }

  /** The axis can be dragged. */
  drag() {
    this.axisCanvas.addEventListener("pointerdown", (down) => {
      const before = this.range[0];
      const [, width] = this.lane();
      const move = (event) => this.pan(before - ((event.clientX - down.clientX) / width) * (this.range[1] - this.range[0]));
      this.axisCanvas.setPointerCapture(down.pointerId);
      this.axisCanvas.addEventListener("pointermove", move);
      this.axisCanvas.addEventListener("pointerup", () => this.axisCanvas.removeEventListener("pointermove", move), { once: true });
    });
  }

  /** Which rows can be seen: [first, stop). */
  window() {
    if (this.all) return [0, this.rows.length];
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / ROW) - 2);
    return [first, Math.min(this.rows.length, Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / ROW) + 2)];
  }

  /** Bring an agent's row into view. */
  reveal(agent) {
    const top = this.rows.indexOf(agent) * ROW;
    if (top < 0) return;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (top + ROW > this.scroller.scrollTop + this.scroller.clientHeight) this.scroller.scrollTop = top + ROW - this.scroller.clientHeight;
    this.drawNow();
  }

  drawNow() {
    if (!this.state.episode || !this.scroller.clientWidth) return;
    const [first, stop] = this.window();
    const height = this.all ? this.rows.length * ROW : this.scroller.clientHeight;
    const brush = this.brush(this.canvas, this.scroller.clientWidth, height);
    const colour = this.colours();
    this.names(first, stop);
    const top = this.all ? 0 : this.scroller.scrollTop;
    const [left, width] = this.lane();
    this.ticks(brush, colour, height);
    brush.save();
    brush.beginPath();
    brush.rect(left - 1, 0, width + 15, height);
    brush.clip();
    this.path(brush, colour, top, first, stop);
    for (let number = first; number < stop; number += 1) this.row(brush, colour, this.rows[number], number * ROW - top);
    brush.restore();
  }

  brush(canvas, width, height) {
    const ratio = Math.max(1, devicePixelRatio || 1);
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    const brush = canvas.getContext("2d");
    brush.setTransform(ratio, 0, 0, ratio, 0, 0);
    brush.clearRect(0, 0, width, height);
    return brush;
  }

  colours() {
    const style = getComputedStyle($("gantt"));
    const probe = {};
    for (const name of ["model", "tool", "wait", "lit", "lit-soft", "error", "life", "grid", "muted", "paper"]) {
      probe[name] = style.getPropertyValue(`--c-${name}`).trim();
    }
    return probe;
  }

  ticks(brush, colour, height) {
    const [left, width] = this.lane();
    const head = this.brush(this.axisCanvas, this.scroller.clientWidth, HEAD);
    const span = this.range[1] - this.range[0];
    const rough = span / Math.max(2, width / 90);
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
    if (this.state.axis !== "seconds") step = Math.max(1, step);
    head.font = "12px system-ui, sans-serif";
    head.textBaseline = "middle";
    head.fillStyle = colour.muted;
    brush.fillStyle = colour.grid;
    for (let value = Math.ceil(this.range[0] / step) * step; value <= this.range[1] + step * 1e-6; value += step) {
      const x = Math.round(this.x(value));
      brush.fillRect(x, 0, 1, height);
      head.fillStyle = colour.grid;
      head.fillRect(x, HEAD - 6, 1, 6);
      head.fillStyle = colour.muted;
      const words = this.state.axis === "seconds" ? tickSeconds(value, step) : compact(value);
      head.textAlign = x > left + width - 20 ? "right" : x < left + 12 ? "left" : "center";
      head.fillText(words, head.textAlign === "right" ? x + 13 : x, HEAD / 2 - 1);
    }
  }

  row(brush, colour, agent, top) {
    const axis = this.state.axis;
    const middle = top + ROW / 2;
    const [from, to] = agent.at[axis].map((value) => this.x(value));
    const faint = this.state.hits && !this.state.hits.has(agent.id);
    brush.globalAlpha = faint ? 0.35 : 1;
    brush.fillStyle = colour.life;
    brush.fillRect(from, middle - 0.75, Math.max(1, to - from), 1.5);
    let lastEnd = -1, lastKind = null;
    // What is lit lies over what is not, and model calls over tool calls.
    for (const pass of ["tool", "lit tool", "model"]) {
      for (const call of agent.calls) {
        const lit = call.on_critical_path.includes(axis);
        if ((call.kind === "tool" && lit ? "lit tool" : call.kind) !== pass) continue;
        const [start, end] = call.at[axis].map((value) => this.x(value));
        if (end < this.lane()[0] - 2 || start > this.scroller.clientWidth) continue;
        const kind = `${pass}${lit}${call.wrong}`;
        // What would be drawn over a bar of the same kind and not be seen.
        if (kind === lastKind && end < lastEnd + 0.5) continue;
        [lastEnd, lastKind] = [end, kind];
        this.bar(brush, colour, call, start, end, middle, lit);
      }
    }
    if (agent.status === "unfinished") {
      brush.fillStyle = colour.muted;
      for (const gap of [3, 7, 11]) brush.fillRect(to + gap, middle - 1, 2, 2);
    }
    brush.globalAlpha = 1;
  }

  bar(brush, colour, call, start, end, middle, lit) {
    const delegates = call.kind === "tool" && call.children.length > 0;
    const height = call.kind === "model" ? 14 : delegates ? 14 : 6;
    const gap = end - start > 4 ? 0.5 : 0;
    const width = Math.max(call.kind === "tool" && this.state.axis !== "seconds" && !delegates ? 2 : 1.5, end - start - gap);
    brush.fillStyle = call.wrong ? colour.error : delegates ? (lit ? colour["lit-soft"] : colour.wait)
      : lit ? colour.lit : call.kind === "model" ? colour.model : colour.tool;
    const begun = call.kind === "model" && this.state.axis === "seconds" ? this.x(call.started + call.waited) : start;
    const inLine = begun - start < 3 ? 0 : Math.min(width, begun - start);
    if (inLine) this.hatch(brush, start, start + inLine, middle - height / 2, height);
    brush.beginPath();
    brush.roundRect(start + inLine, middle - height / 2, width - inLine, height, Math.min(3, (width - inLine) / 2));
    brush.fill();
    if (call.attempts > 1) {
      brush.fillStyle = colour.error;
      brush.beginPath();
      brush.arc(start + Math.min(4, width / 2), middle - height / 2 - 1, 2.2, 0, 7);
      brush.fill();
    }
    if (call === this.state.call) {
      brush.strokeStyle = colour.muted;
      brush.lineWidth = 1.5;
      brush.beginPath();
      brush.roundRect(start - 2, middle - height / 2 - 2, width + 4, height + 4, 4);
      brush.stroke();
    }
  }

  /** The part of a model call that was spent in line, in the colour of its bar. */
  hatch(brush, start, end, top, height) {
    const gap = 4;
    const last = Math.min(end, this.scroller.clientWidth);
    brush.save();
    brush.beginPath();
    brush.rect(start, top, end - start, height);
    brush.clip();
    brush.beginPath();
    brush.rect(start, top, end - start, height);
    // Lines keep their places when the picture is moved; those that cannot be seen are not drawn.
    const unseen = Math.max(0, Math.floor((this.lane()[0] - start) / gap) - 1);
    for (let x = start - height + unseen * gap; x < last; x += gap) {
      brush.moveTo(x, top + height);
      brush.lineTo(x + height, top);
    }
    brush.strokeStyle = brush.fillStyle;
    brush.lineWidth = 1;
    brush.stroke();
    brush.restore();
  }

  /** The lit path from a tool call down to the sub-agent that it waits for, and back. */
  path(brush, colour, top, first, stop) {
    const axis = this.state.axis;
    const number = this.numbers();
    brush.strokeStyle = colour.lit;
    brush.lineWidth = 1.75;
    brush.lineJoin = "round";
    for (const agent of this.state.episode.agents) {
      if (!agent.lit[axis] || !agent.parent || !number.has(agent.id) || !number.has(agent.parent)) continue;
      const [above, below] = [number.get(agent.parent), number.get(agent.id)];
      if (above > stop || below < first) continue;
      const [from, to] = agent.at[axis].map((value) => this.x(value));
      const [y0, y1] = [above * ROW + ROW / 2 - top, below * ROW + ROW / 2 - top];
      for (const x of [from, to]) {
        brush.beginPath();
        brush.moveTo(x, y0);
        brush.lineTo(x, y1);
        brush.stroke();
      }
      brush.fillStyle = colour.lit;
      brush.beginPath();
      brush.moveTo(from - 3.5, y1 - 12);
      brush.lineTo(from + 3.5, y1 - 12);
      brush.lineTo(from, y1 - 7);
      brush.fill();
      brush.beginPath();
      brush.moveTo(to - 3.5, y0 + 12);
      brush.lineTo(to + 3.5, y0 + 12);
      brush.lineTo(to, y0 + 7);
      brush.fill();
    }
  }

  numbers() {
    if (this.numbered !== this.rows) {
      this.numbered = this.rows;
      this.numberOf = new Map(this.rows.map((agent, number) => [agent.id, number]));
    }
    return this.numberOf;
  }

  /** Elements for the names of the rows that can be seen, and no others. */
  names(first, stop) {
    const wanted = new Set(this.rows.slice(first, stop));
    for (const [agent, element] of this.shown) {
      if (!wanted.has(agent)) {
        element.remove();
        this.shown.delete(agent);
      }
    }
    const [left] = this.lane();
    const body = $("rows");
    for (let number = first; number < stop; number += 1) {
      const agent = this.rows[number];
      let element = this.shown.get(agent);
      if (!element) {
        element = this.name(agent, number);
        this.shown.set(agent, element);
        body.append(element);
      }
      const chosen = agent === this.state.agent;
      element.classList.toggle("chosen", chosen);
      element.setAttribute("aria-selected", chosen);
      element.firstChild.style.width = `${left - 8}px`;
    }
    const chosen = this.shown.get(this.state.agent);
    if (chosen) this.scroller.setAttribute("aria-activedescendant", chosen.id);
    else this.scroller.removeAttribute("aria-activedescendant");
  }

  name(agent, number) {
    const { axis, folded, hits } = this.state;
    const [from, to] = agent.at[axis];
    const unfolded = agent.children.length ? !folded.has(agent.id) : null;
    const row = make("div", {
      class: `row${agent.lit[axis] ? " lit" : ""}`, role: "treeitem", id: `row-${number}`, "aria-level": agent.depth + 1,
      "aria-expanded": unfolded === null ? null : String(unfolded), title: `${agent.name} (${agent.id})`,
    }, make("div", { class: "name" },
      make("span", { class: "fold", "aria-hidden": "true" }, unfolded === null ? "" : unfolded ? "▾" : "▸"),
      make("span", { class: `dot ${agent.status}`, role: "img", "aria-label": agent.status }),
      make("span", { class: "who", dir: "auto" }, agent.name),
      agent.errors.length ? make("span", { class: "wrong", title: plural(agent.errors.length, "error") }, `${agent.errors.length}`) : null,
      hits?.has(agent.id) ? make("span", { class: "hits" }, plural(hits.get(agent.id), "hit")) : null,
      make("span", { class: "value" }, axis === "seconds" ? duration(to - from) : compact(to - from))));
    row.style.top = `${number * ROW}px`;
    row.firstChild.style.paddingLeft = `${4 + Math.min(agent.depth, 8) * 14}px`;
    return row;
  }

  /** The agent and the call at a place of the screen. */
  at(event) {
    const box = this.scroller.getBoundingClientRect();
    const row = event.target.closest?.(".row");
    const agent = row ? this.rows[Number(row.id.slice(4))] : undefined;
    const x = event.clientX - box.left;
    if (!agent || x < this.lane()[0] - 3) return { agent, call: null, x };
    let best = null;
    for (const call of agent.calls) {
      const [start, end] = call.at[this.state.axis].map((value) => this.x(value));
      const near = x < start ? start - x : x > end ? x - end : 0;
      const size = end - start;
      if (near < 5 && (!best || near < best.near || (near === best.near && size <= best.size))) best = { call, near, size };
    }
    return { agent, call: best?.call ?? null, x };
  }

  click(event) {
    const { agent, call } = this.at(event);
    if (!agent) return;
    if (event.target.classList.contains("fold") && agent.children.length) this.choose(agent, { fold: true });
    else this.choose(agent, { call, open: true });
  }

  hover(event) {
    const { agent, call } = this.at(event);
    this.scroller.style.cursor = agent ? "pointer" : "";
    this.tip(call, event);
  }

  tip(call, event) {
    const tip = $("tip");
    tip.hidden = !call;
    if (!call) return;
    const model = call.kind === "model";
    tip.replaceChildren(
      make("b", {}, model ? `step ${call.step}` : call.name),
      make("span", {}, ` ${duration(call.end - call.started)}${call.unfinished ? ", not finished" : ""}`),
      model ? make("div", {}, `${count(call.usage.input_tokens)} tokens in, ${count(call.usage.output_tokens)} out · ${dollars(call.money)}`)
        : make("div", { class: "clip" }, argumentsLine(call.arguments)),
      call.on_critical_path.length ? make("div", { class: "glow" }, `critical path in ${call.on_critical_path.join(", ")}`) : null,
      model && call.waited ? make("div", {}, `${duration(call.waited)} of it in line`) : null,
      call.attempts > 1 ? make("div", { class: "bad" }, `${call.attempts} attempts`) : null,
      call.wrong ? make("div", { class: "bad" }, model ? oneLine(`${call.error.kind}: ${call.error.message}`, 120) : "the tool reports an error") : null);
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = `${Math.max(6, Math.min(innerWidth - width - 6, event.clientX + 14))}px`;
    tip.style.top = `${event.clientY + height + 24 > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
  }
}

function tickSeconds(value, step) {
  if (value >= 120 && step >= 1) {
    const whole = Math.round(value);
    return whole >= 3600 ? `${Math.floor(whole / 3600)}:${String(Math.floor(whole / 60) % 60).padStart(2, "0")} h`
      : `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
  }
  const digits = step >= 1 ? 0 : Math.min(4, Math.ceil(-Math.log10(step)));
  return `${value.toFixed(digits)} s`;
}
