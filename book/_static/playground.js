/* The Langevin playground: particles walk on an energy, in the page itself. No library, no network.

   The book's convention: p(x) is proportional to exp(-E(x)/T), a step of size eps is
   x - eps^2/2 grad E(x)/T + eps z. The upper part, `core`, computes and draws nothing; its functions change
   none of their arguments, but for `advance` and `recount`, which move a simulation. The lower part is the
   element: every <div class="langevin-playground" data-seed="0" data-landscape="quadratic"> becomes one.

   n particles in d dimensions are one Float64Array of n * d numbers, particle after particle. */
(() => {
  "use strict";

  // --- core: random numbers ------------------------------------------------------------------------

  /** A seeded source of uniform() in (0, 1) and of standard normal() numbers (sfc32; Box and Muller). */
  function random(seed) {
    let a = 0x9e3779b9, b = 0x243f6a88, c = seed >>> 0, counter = 1, spare = null;
    function bits() {
      const sum = (a + b + counter) | 0;
      counter = (counter + 1) | 0;
      a = b ^ (b >>> 9);
      b = (c + (c << 3)) | 0;
      c = (((c << 21) | (c >>> 11)) + sum) | 0;
      return sum >>> 0;
    }
    for (let round = 0; round < 20; round++) bits(); // until the seed has reached every bit
    const uniform = () => (bits() + 0.5) / 2 ** 32; // never 0, whose logarithm is taken
    function normal() {
      if (spare !== null) {
        const kept = spare;
        spare = null;
        return kept;
      }
      const radius = Math.sqrt(-2 * Math.log(uniform())), angle = 2 * Math.PI * uniform();
      spare = radius * Math.sin(angle);
      return radius * Math.cos(angle);
    }
    return { uniform, normal };
  }

  // --- core: the chapter's landscapes --------------------------------------------------------------

  const BARRIER = 4; // of the double well
  const RING_STD = 0.25;
  const RING_MEANS = Array.from({ length: 8 }, (_, k) => [
    2 * Math.cos((k * Math.PI) / 4),
    2 * Math.sin((k * Math.PI) / 4),
  ]);

  /* energy(x, i, grad): E of particle i of x, its gradient written to grad at the same place.
     barrier: how far above a minimum the way to the next one leads; none in a single well.
     curvature: the second derivative of E at a minimum. reach(T): beyond it p is below e^-30 of its peak.
     home(x, i): whether particle i is where all are born; homeShare: what p gives that part, at any T. */
  const landscapes = {
    quadratic: {
      label: "quadratic, x²/2",
      dim: 1,
      birth: [0],
      curvature: 1,
      reach: (T) => 9 * Math.sqrt(T),
      energy(x, i, grad) {
        grad[i] = x[i];
        return (x[i] * x[i]) / 2;
      },
      view: { half: 5, top: 9, ticks: 2, bins: 60 },
      eps: { min: 0.1, max: 2.4, step: 0.05, start: 1 },
    },
    "double well": {
      label: "double well, 4(x² − 1)²",
      dim: 1,
      birth: [-1],
      curvature: 8 * BARRIER,
      barrier: BARRIER,
      reach: (T) => Math.sqrt(1 + Math.sqrt((40 * T) / BARRIER)),
      energy(x, i, grad) {
        const above = x[i] * x[i] - 1;
        grad[i] = 4 * BARRIER * x[i] * above;
        return BARRIER * above * above;
      },
      home: (x, i) => x[i] < 0,
      homeShare: 1 / 2,
      homeLabel: "in the well of birth",
      view: { half: 2, top: 7, ticks: 1, bins: 60 },
      eps: { min: 0.02, max: 0.6, step: 0.01, start: 0.1 },
    },
    ring: {
      label: "ring of 8 Gaussians",
      dim: 2,
      birth: [2, 0],
      curvature: 1 / RING_STD ** 2,
      // Halfway between two neighbours, where both count alike; the other six are too far off to count.
      barrier: (2 * Math.sin(Math.PI / 8)) ** 2 / (2 * RING_STD ** 2) - Math.log(2),
      reach: (T) => 2 + 8 * RING_STD * Math.sqrt(T),
      energy(x, i, grad) {
        const u = x[2 * i], v = x[2 * i + 1], scale = 2 * RING_STD ** 2;
        let nearest = Infinity;
        for (const [m, n] of RING_MEANS) nearest = Math.min(nearest, (u - m) ** 2 + (v - n) ** 2);
        let total = 0, meanU = 0, meanV = 0;
        for (const [m, n] of RING_MEANS) {
          // Relative to the nearest mode, so that no exponential is lost far out.
          const weight = Math.exp((nearest - (u - m) ** 2 - (v - n) ** 2) / scale);
          total += weight;
          meanU += weight * m;
          meanV += weight * n;
        }
        grad[2 * i] = (u - meanU / total) / RING_STD ** 2;
        grad[2 * i + 1] = (v - meanV / total) / RING_STD ** 2;
        return nearest / scale - Math.log(total / RING_MEANS.length);
      },
      home: (x, i) => x[2 * i] > 0 && Math.abs(x[2 * i + 1]) < x[2 * i] * Math.tan(Math.PI / 8),
      homeShare: 1 / 8,
      homeLabel: "in the mode of birth",
      view: { half: 3.2, top: 0, ticks: 1, bins: 48 },
      eps: { min: 0.02, max: 0.7, step: 0.02, start: 0.1 },
    },
  };

  // --- core: one step ------------------------------------------------------------------------------

  /** One unadjusted step of all particles: {x, acceptance}, the acceptance being 1. */
  function step(landscape, x, eps, T, source) {
    const grad = new Float64Array(x.length), next = new Float64Array(x.length);
    for (let i = 0; i < x.length / landscape.dim; i++) landscape.energy(x, i, grad);
    for (let j = 0; j < x.length; j++) {
      next[j] = x[j] - ((eps * eps) / 2) * (grad[j] / T) + eps * source.normal();
    }
    return { x: next, acceptance: 1 };
  }

  /** One Metropolis-adjusted step of all particles: {x, acceptance}, the mean acceptance probability. */
  function mala(landscape, x, eps, T, source) {
    const { dim } = landscape, half = (eps * eps) / 2, n = x.length / dim;
    const grad = new Float64Array(x.length), gradNew = new Float64Array(x.length);
    const next = new Float64Array(x.length);
    let acceptance = 0;
    for (let i = 0; i < n; i++) {
      const before = landscape.energy(x, i, grad);
      let forth = 0, back = 0;
      for (let j = i * dim; j < (i + 1) * dim; j++) {
        const z = source.normal();
        forth += z * z;
        next[j] = x[j] - half * (grad[j] / T) + eps * z;
      }
      const after = landscape.energy(next, i, gradNew);
      for (let j = i * dim; j < (i + 1) * dim; j++) {
        // The noise that the step back, from next to x, would have had to draw.
        back += ((x[j] - next[j] + half * (gradNew[j] / T)) / eps) ** 2;
      }
      let logRatio = (before - after) / T + (forth - back) / 2;
      if (Number.isNaN(logRatio)) logRatio = -Infinity; // a proposal beyond every bound
      acceptance += Math.exp(Math.min(0, logRatio)) / n;
      if (!(Math.log(source.uniform()) < logRatio)) next.set(x.subarray(i * dim, (i + 1) * dim), i * dim);
    }
    return { x: next, acceptance };
  }

  // --- core: what is known exactly -----------------------------------------------------------------

  /** The density of the first coordinate at temperature T, by quadrature on even nodes:
      {nodes, p, variance}, in two dimensions with the plane (row after row of the second coordinate). */
  function density(landscape, T) {
    const { dim } = landscape, reach = landscape.reach(T), count = dim === 1 ? 2001 : 161;
    const width = (2 * reach) / (count - 1), nodes = new Float64Array(count).map((_, k) => k * width - reach);
    const rows = dim === 1 ? [0] : nodes, plane = new Float64Array(count * rows.length);
    const point = new Float64Array(dim), grad = new Float64Array(dim), p = new Float64Array(count);
    rows.forEach((v, row) => {
      nodes.forEach((u, k) => {
        point[0] = u;
        if (dim === 2) point[1] = v;
        plane[row * count + k] = Math.exp(-landscape.energy(point, 0, grad) / T);
        p[k] += plane[row * count + k];
      });
    });
    // All ends are far out in the tails, where the trapezoidal rule is a plain sum.
    const total = p.reduce((sum, value) => sum + value, 0) * width;
    for (let k = 0; k < count; k++) p[k] /= total;
    const moment = (power) => nodes.reduce((sum, u, k) => sum + u ** power * p[k], 0) * width;
    return { nodes, p, variance: moment(2) - moment(1) ** 2, plane: dim === 2 ? plane : null };
  }

  /** The step from which an unadjusted chain overshoots at the bottom: 2 s on a Gaussian of deviation s. */
  const stableLimit = (landscape, T) => 2 * Math.sqrt(T / landscape.curvature);

  /** Variance that the unadjusted chain settles into on the quadratic: eps^2 / (1 - a^2), where a step
      multiplies by a = 1 - eps^2 curvature / 2T. Infinity if |a| >= 1, null on another landscape. */
  function unadjustedVariance(landscape, eps, T) {
    if (landscape !== landscapes.quadratic) return null;
    const a = 1 - (eps * eps * landscape.curvature) / (2 * T);
    return Math.abs(a) < 1 ? (eps * eps) / (1 - a * a) : Infinity;
  }

  // --- core: what is measured ----------------------------------------------------------------------

  /** The particles' density in even bins of the first coordinate over [-half, half]; strays count too. */
  function histogram(landscape, x) {
    const { half, bins } = landscape.view, { dim } = landscape, counts = new Float64Array(bins);
    for (let j = 0; j < x.length; j += dim) {
      const bin = Math.floor(((x[j] + half) / (2 * half)) * bins);
      if (bin >= 0 && bin < bins) counts[bin] += (dim / x.length) * (bins / (2 * half));
    }
    return counts;
  }

  /** Mean and mean square of the first coordinate, and the share of particles where they were born. */
  function measure(landscape, x) {
    const { dim } = landscape, n = x.length / dim;
    let mean = 0, square = 0, home = 0;
    for (let i = 0; i < n; i++) {
      mean += x[i * dim] / n;
      square += (x[i * dim] * x[i * dim]) / n;
      if (landscape.home && landscape.home(x, i)) home += 1 / n;
    }
    return { mean, square, home };
  }

  /** A simulation at its birth, of {landscape, adjusted, eps, T, particles, seed}. */
  function start(settings) {
    const { birth } = landscapes[settings.landscape];
    const x = new Float64Array(settings.particles * birth.length).map((_, j) => birth[j % birth.length]);
    return recount({ ...settings, x, age: 0, lost: false, source: random(settings.seed) });
  }

  /** Begin the running averages of a simulation anew; its particles stay. */
  function recount(simulation) {
    const bars = new Float64Array(landscapes[simulation.landscape].view.bins);
    return Object.assign(simulation, { counted: 0, mean: 0, square: 0, acceptance: 0, bars });
  }

  /** Move a simulation by some steps. The k-th step counts with weight k^3 in the averages, roughly, so that
      the start is soon forgotten. A particle that leaves every bound ends it, and `lost` says so. */
  function advance(simulation, steps) {
    const landscape = landscapes[simulation.landscape], { eps, T, source } = simulation;
    for (let done = 0; done < steps && !simulation.lost; done++) {
      const moved = (simulation.adjusted ? mala : step)(landscape, simulation.x, eps, T, source);
      simulation.x = moved.x;
      simulation.age += 1;
      simulation.lost = !moved.x.every((value) => Math.abs(value) < 1e6);
      simulation.counted += 1;
      const weight = 4 / (simulation.counted + 3), now = measure(landscape, moved.x);
      simulation.mean += weight * (now.mean - simulation.mean);
      simulation.square += weight * (now.square - simulation.square);
      simulation.acceptance += weight * (moved.acceptance - simulation.acceptance);
      const bars = histogram(landscape, moved.x);
      simulation.bars.forEach((old, bin) => (simulation.bars[bin] = old + weight * (bars[bin] - old)));
    }
    return simulation;
  }

  const core = {
    random, landscapes, step, mala, density, stableLimit, unadjustedVariance,
    histogram, measure, start, recount, advance,
  };

  // --- the element: controls -----------------------------------------------------------------------

  const TEMPERATURES = [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4];
  const PARTICLES = [1, 10, 100, 300, 1000, 3000];
  const SPEEDS = { slow: 15, normal: 200, fast: 1200 }; // steps a second
  const QUIET_MS = 15000; // between two summaries read out while the chain runs
  const instances = [];

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const number = (value) =>
    !Number.isFinite(value) ? "none" : Math.abs(value) < 1000 ? value.toFixed(value < 0.1 ? 4 : 3) : value.toExponential(1);
  const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)}\u00a0%`;

  class Playground {
    constructor(root) {
      const landscape = root.dataset.landscape in landscapes ? root.dataset.landscape : "quadratic";
      this.root = root;
      this.id = `langevin-playground-${instances.length + 1}`;
      this.settings = {
        landscape, adjusted: false, eps: landscapes[landscape].eps.start, T: 1, particles: 300,
        seed: Number(root.dataset.seed) || 0,
      };
      this.rate = SPEEDS.normal;
      this.running = !matchMedia("(prefers-reduced-motion: reduce)").matches;
      this.visible = false;
      this.debt = 0; // steps due, in fractions
      this.spoken = 0;
      this.build();
      this.restart();
      this.watch();
    }

    get landscape() {
      return landscapes[this.settings.landscape];
    }

    /** A labelled control; `note`, if any, stands at the right of its label. */
    field(label, control, note) {
      control.id = `${this.id}-${label.replace(/\W+/g, "-").toLowerCase()}`;
      const top = element("label", { for: control.id }, label);
      return element("div", { class: "pg-field" }, note ? element("div", { class: "pg-top" }, top, note) : top, control);
    }

    select(options, chosen, act) {
      const control = element("select");
      for (const [value, label] of options) control.append(new Option(label, value, false, value === chosen));
      control.addEventListener("change", () => act(control.value));
      return control;
    }

    build() {
      const { settings } = this;
      this.canvas = element("canvas", { role: "img", "aria-describedby": `${this.id}-summary` });
      this.epsSlider = element("input", { type: "range" });
      this.epsSlider.addEventListener("input", () => this.set("eps", Number(this.epsSlider.value)));
      this.epsNote = element("output", {});
      this.limitNote = element("div", { class: "pg-hint" });
      this.warmth = element("input", { type: "range", min: 0, max: TEMPERATURES.length - 1, step: 1 });
      this.warmth.addEventListener("input", () => this.set("T", TEMPERATURES[this.warmth.value]));
      this.warmthNote = element("output", {});
      this.levelNote = element("div", { class: "pg-hint" });
      const names = Object.entries(landscapes).map(([name, { label }]) => [name, label]);
      const chains = [["unadjusted", "unadjusted"], ["adjusted", "Metropolis-adjusted"]];
      this.playButton = this.button("Pause", () => this.toggle());
      const eps = this.field("Step size ε", this.epsSlider, this.epsNote);
      const warmth = this.field("Temperature T", this.warmth, this.warmthNote);
      eps.append(this.limitNote);
      warmth.append(this.levelNote);
      this.message = element("p", { class: "pg-message", role: "status" });
      this.summary = element("p", { class: "pg-spoken", id: `${this.id}-summary`, "aria-live": "polite" });
      this.tiles = {
        variance: this.tile("bar", ""),
        exact: this.tile("line", ""),
        closed: this.tile("dash", "variance, closed form of the chain"),
        home: this.tile("", ""),
        acceptance: this.tile("", "acceptance"),
        age: this.tile("", "age, steps"),
      };
      this.root.replaceChildren(
        element("div", { class: "pg-fields" },
          this.field("Landscape", this.select(names, settings.landscape, (name) => this.set("landscape", name))),
          this.field("Chain", this.select(chains, "unadjusted", (name) => this.set("adjusted", name === "adjusted"))),
          this.field("Particles", this.select(PARTICLES.map((n) => [String(n), String(n)]), String(settings.particles),
            (count) => this.set("particles", Number(count)))),
          this.field("Speed", this.select(Object.entries(SPEEDS).map(([name, rate]) => [String(rate), name]),
            String(this.rate), (rate) => (this.rate = Number(rate))))),
        element("div", { class: "pg-fields pg-sliders" }, eps, warmth),
        element("div", { class: "pg-stage" }, this.canvas, this.message),
        element("div", { class: "pg-buttons" }, this.playButton, this.button("Step", () => this.jump(1)),
          this.button("100 steps", () => this.jump(100)), this.button("Restart", () => this.restart())),
        element("dl", { class: "pg-tiles" }, ...Object.values(this.tiles).map(({ box }) => box)),
        this.summary,
      );
      this.root.setAttribute("role", "group");
      this.root.setAttribute("aria-label", "Langevin playground");
    }

    button(label, act) {
      const made = element("button", { type: "button" }, label);
      made.addEventListener("click", act);
      return made;
    }

    tile(mark, label) {
      const name = element("dt", mark ? { class: `pg-mark pg-${mark}` } : {}, label), value = element("dd");
      return { box: element("div", {}, name, value), name, value };
    }

    // --- the element: what the controls do ---------------------------------------------------------

    /** Change one setting. Another landscape or number of particles starts anew; so does a lost chain. */
    set(name, value) {
      this.settings[name] = value;
      if (name === "landscape") this.settings.eps = this.landscape.eps.start;
      if (name === "landscape" || name === "particles" || this.simulation.lost) {
        this.restart();
      } else {
        this.simulation[name] = value;
        recount(this.simulation);
        this.refresh();
      }
    }

    restart() {
      this.simulation = start(this.settings);
      this.refresh();
    }

    play(running) {
      this.running = running;
      this.refresh();
    }

    /** The first button: pause or go on; after a loss, all anew. */
    toggle() {
      if (this.simulation.lost) {
        this.simulation = start(this.settings);
        this.play(true);
      } else {
        this.play(!this.running);
      }
    }

    jump(steps) {
      this.running = false;
      advance(this.simulation, steps);
      this.refresh();
    }

    /** After anything the reader did: all that depends on the settings, then the picture. */
    refresh() {
      const { settings, landscape } = this, { min, max, step: by } = landscape.eps;
      this.exact = density(landscape, settings.T);
      this.closed = settings.adjusted ? null : unadjustedVariance(landscape, settings.eps, settings.T);
      Object.assign(this.epsSlider, { min, max, step: by, value: settings.eps });
      this.epsNote.textContent = settings.eps.toFixed(2);
      this.warmth.value = TEMPERATURES.indexOf(settings.T);
      this.warmth.setAttribute("aria-valuetext", String(settings.T));
      this.warmthNote.textContent = String(settings.T);
      const limit = stableLimit(landscape, settings.T).toFixed(2);
      this.limitNote.textContent = settings.adjusted
        ? "any step leaves p alone"
        : landscape === landscapes["double well"]
          ? `overshoots even at the bottom from ${limit} on`
          : `stable below ${limit}`;
      this.levelNote.textContent = landscape.barrier
        ? `the barrier is ${(landscape.barrier / settings.T).toFixed(1)} T high`
        : `p is a Gaussian of variance ${settings.T}`;
      this.canvas.setAttribute("aria-label", landscape.dim === 1
        ? "Particles on the curve of the energy; below, their histogram against the exact density."
        : "Particles on the density in the plane; beside it, the histogram of x₁ against the exact density.");
      this.show();
      clearTimeout(this.soon);
      this.soon = setTimeout(() => this.speak(), 700);
      this.loop();
    }

    /** The numbers and the picture of this moment. */
    show() {
      const { simulation, settings, landscape, tiles } = this;
      const { counted, lost } = simulation, none = "–";
      const variance = simulation.square - simulation.mean ** 2;
      const coordinate = landscape.dim === 1 ? "" : " (x₁)";
      tiles.variance.name.textContent = `variance${coordinate}, particles`;
      tiles.exact.name.textContent = `variance${coordinate}, exact p`;
      tiles.variance.value.textContent = lost ? "lost" : counted ? number(variance) : none;
      tiles.exact.value.textContent = number(this.exact.variance);
      tiles.closed.box.hidden = this.closed === null;
      tiles.closed.value.textContent = number(this.closed ?? 0);
      tiles.home.box.hidden = !landscape.home;
      tiles.home.name.textContent = `${landscape.homeLabel} (p: ${100 * landscape.homeShare}\u00a0%)`;
      tiles.home.value.textContent = lost ? none : percent(measure(landscape, simulation.x).home);
      tiles.acceptance.value.textContent = !settings.adjusted ? "no test" : counted ? number(simulation.acceptance) : none;
      tiles.age.value.textContent = simulation.age.toLocaleString("en");
      this.playButton.textContent = lost ? "Again" : this.running ? "Pause" : "Run";
      const said = this.trouble();
      if (this.message.textContent !== said) this.message.textContent = said;
      this.draw();
    }

    /** What is wrong with the chain, in words; nothing when nothing is. */
    trouble() {
      const { simulation, settings, landscape } = this, limit = stableLimit(landscape, settings.T).toFixed(2);
      const advice = "Take a smaller ε or a higher T, or adjust the chain.";
      const eps = settings.eps.toFixed(2);
      if (simulation.lost) {
        const cause = landscape === landscapes["double well"]
          ? `at ε = ${eps} a particle far out overshoots by more at every step`
          : `ε = ${eps} is not below the stable limit ${limit}`;
        return `Diverged at step ${simulation.age.toLocaleString("en")}: ${cause}. ${advice}`;
      }
      if (settings.adjusted || settings.eps < stableLimit(landscape, settings.T)) return "";
      return landscape === landscapes["double well"]
        ? `Unstable: from ε = ${limit} on a step overshoots even at the bottom of a well. ${advice}`
        : `Unstable: from ε = ${limit} on the chain has no stationary law. ${advice}`;
    }

    speak() {
      const { simulation, tiles } = this;
      this.spoken = performance.now();
      const shown = Object.values(tiles).filter(({ box }) => !box.hidden);
      const numbers = shown.map(({ name, value }) => `${name.textContent}: ${value.textContent}`).join("; ");
      this.summary.textContent = simulation.lost ? "" : `${this.running ? "Running" : "Paused"}. ${numbers}.`;
    }

    // --- the element: time ---------------------------------------------------------------------------

    get moving() {
      return this.running && this.visible && !this.simulation.lost;
    }

    loop() {
      if (this.frame || !this.moving) return;
      this.then = null;
      const tick = (now) => {
        this.frame = 0;
        if (!this.moving) return;
        this.debt += ((this.then === null ? 16 : Math.min(50, now - this.then)) * this.rate) / 1000;
        this.then = now;
        const due = Math.floor(this.debt);
        this.debt -= due;
        if (due) {
          // A slow machine walks as far as it gets in a frame, and the rest of the debt is forgotten.
          for (let taken = 0; taken < due && performance.now() < now + 14; taken++) advance(this.simulation, 1);
          this.show();
          if (now - this.spoken > QUIET_MS) this.speak();
        }
        this.frame = requestAnimationFrame(tick);
      };
      this.frame = requestAnimationFrame(tick);
    }

    /** Rest out of sight; draw again for another width or theme. */
    watch() {
      new IntersectionObserver((seen) => {
        this.visible = seen[seen.length - 1].isIntersecting;
        this.loop();
      }).observe(this.canvas);
      new ResizeObserver(() => this.draw()).observe(this.canvas);
      const dyed = () => {
        this.colours = null;
        this.draw();
      };
      new MutationObserver(dyed).observe(document.documentElement, { attributeFilter: ["data-theme"] });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dyed);
    }

    // --- the element: the picture ----------------------------------------------------------------------

    palette() {
      const style = getComputedStyle(this.root), get = (name) => style.getPropertyValue(`--pg-${name}`).trim();
      return { ink: get("ink"), muted: get("muted"), grid: get("grid"), ground: get("ground"),
        bead: get("bead"), dash: get("dash"), font: `12px ${style.fontFamily}` };
    }

    draw() {
      const width = this.canvas.clientWidth;
      if (!width) return;
      const { dim } = this.landscape, beside = width >= 560, ratio = window.devicePixelRatio || 1;
      const height = dim === 1 ? 400 : beside ? 330 : Math.min(width, 330) + 190;
      this.canvas.style.height = `${height}px`;
      const size = [Math.round(width * ratio), Math.round(height * ratio)];
      if (this.canvas.width !== size[0]) this.canvas.width = size[0];
      if (this.canvas.height !== size[1]) this.canvas.height = size[1];
      this.colours ??= this.palette();
      const pen = this.canvas.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, width, height);
      pen.font = this.colours.font;
      const edge = 8, foot = 22, head = 20;
      if (dim === 1) {
        const cut = Math.round(height * 0.53);
        this.drawEnergy(pen, { x: edge, y: head, w: width - 2 * edge, h: cut - head });
        this.drawDensity(pen, { x: edge, y: cut + head + 6, w: width - 2 * edge, h: height - foot - cut - head - 6 });
      } else {
        const side = (beside ? height : Math.min(width, 330)) - foot - head;
        const left = beside ? edge : (width - side) / 2;
        this.drawPlane(pen, { x: left, y: head, w: side, h: side });
        this.drawDensity(pen, beside
          ? { x: side + 4 * edge, y: head, w: width - side - 5 * edge, h: side }
          : { x: left, y: side + foot + 2 * head, w: side, h: height - side - 2 * foot - 2 * head });
      }
    }

    /** Maps x in [-half, half] and y in [low, high] to a box, after drawing its caption, grid and ticks. */
    axes(pen, box, caption, low, high, labelled) {
      const { half, ticks } = this.landscape.view, { grid, muted } = this.colours;
      const across = (x) => box.x + ((x + half) / (2 * half)) * box.w;
      const up = (y) => box.y + box.h - ((y - low) / (high - low)) * box.h;
      pen.lineWidth = 1;
      pen.strokeStyle = grid;
      pen.fillStyle = muted;
      pen.textAlign = "center";
      for (let x = -Math.floor(half / ticks) * ticks; x <= half; x += ticks) {
        pen.beginPath();
        pen.moveTo(across(x), box.y);
        pen.lineTo(across(x), box.y + box.h);
        pen.stroke();
        const place = Math.min(Math.max(across(x), box.x + 6), box.x + box.w - 6);
        if (labelled) pen.fillText(x < 0 ? `−${-x}` : String(x), place, box.y + box.h + 16);
      }
      pen.textAlign = "left";
      pen.fillText(caption, box.x, box.y - 7);
      return { across, up };
    }

    curve(pen, xs, f, { across, up }) {
      pen.beginPath();
      xs.forEach((x, k) => pen[k ? "lineTo" : "moveTo"](across(x), up(f(x, k))));
    }

    clipped(pen, box, act) {
      pen.save();
      pen.beginPath();
      pen.rect(box.x, box.y, box.w, box.h);
      pen.clip();
      act();
      pen.restore();
    }

    drawEnergy(pen, box) {
      const { landscape, colours, simulation, settings } = this, { half, top } = landscape.view;
      const low = -0.05 * top, map = this.axes(pen, box, "energy E(x) and the particles on it", low, top, false);
      const point = new Float64Array(1), grad = new Float64Array(1);
      const height = (x) => {
        point[0] = x;
        return landscape.energy(point, 0, grad);
      };
      const xs = Array.from({ length: 241 }, (_, k) => (k / 120 - 1) * half);
      this.clipped(pen, box, () => {
        this.curve(pen, xs, height, map);
        pen.lineTo(map.across(half), map.up(low));
        pen.lineTo(map.across(-half), map.up(low));
        pen.fillStyle = colours.ground;
        pen.fill();
        this.curve(pen, xs, height, map);
        pen.strokeStyle = colours.muted;
        pen.lineWidth = 1.5;
        pen.stroke();
        pen.setLineDash([2, 4]);
        pen.lineWidth = 1;
        pen.beginPath();
        pen.moveTo(box.x, map.up(settings.T));
        pen.lineTo(box.x + box.w, map.up(settings.T));
        pen.stroke();
        pen.setLineDash([]);
        pen.fillStyle = colours.muted;
        pen.textAlign = "right";
        pen.fillText("E = T", box.x + box.w - 4, map.up(settings.T) - 5);
        pen.textAlign = "left";
        const few = simulation.x.length <= 100;
        this.beads(pen, few ? 3.5 : 2.4, few ? 0.85 : 0.55, simulation.x, (i) => {
          // Lifted by a share of 16 pixels that stays each bead's own, so that they do not hide one another.
          const lift = 3 + (few ? 4 : 16) * ((i * 0.618034) % 1);
          return [map.across(simulation.x[i]), map.up(height(simulation.x[i])) - lift];
        });
      });
    }

    beads(pen, radius, alpha, x, place) {
      pen.globalAlpha = alpha;
      pen.fillStyle = this.colours.bead;
      for (let i = 0; i < x.length / this.landscape.dim; i++) {
        const [left, top] = place(i);
        if (!Number.isFinite(left + top)) continue;
        pen.beginPath();
        pen.arc(left, top, radius, 0, 2 * Math.PI);
        pen.fill();
      }
      pen.globalAlpha = 1;
    }

    drawPlane(pen, box) {
      const { simulation, colours, exact, landscape } = this, { half } = landscape.view;
      const map = this.axes(pen, box, "density p(x) and the particles on it", -half, half, true);
      if (this.painted?.exact !== exact || this.painted.ink !== colours.ink) {
        this.painted = { exact, ink: colours.ink, image: this.paint(exact, colours.ink) };
      }
      const reach = exact.nodes[exact.nodes.length - 1], far = map.across(reach) - map.across(-reach);
      this.clipped(pen, box, () => {
        pen.globalAlpha = 0.45;
        pen.drawImage(this.painted.image, map.across(-reach), map.up(reach), far, far);
        const { x } = simulation, few = x.length <= 200;
        this.beads(pen, few ? 3.5 : 2, few ? 0.85 : 0.55, x, (i) => [map.across(x[2 * i]), map.up(x[2 * i + 1])]);
      });
      pen.strokeStyle = colours.grid;
      pen.strokeRect(box.x, box.y, box.w, box.h);
    }

    /** The density in the plane as an image, in ink of that density's strength. */
    paint({ nodes, plane }, ink) {
      const side = nodes.length, image = element("canvas", { width: side, height: side });
      const pen = image.getContext("2d"), most = plane.reduce((a, b) => Math.max(a, b), 0);
      pen.fillStyle = ink;
      for (let row = 0; row < side; row++) {
        for (let k = 0; k < side; k++) {
          const share = plane[row * side + k] / most;
          if (share < 0.01) continue;
          pen.globalAlpha = share;
          pen.fillRect(k, side - 1 - row, 1, 1);
        }
      }
      return image;
    }

    drawDensity(pen, box) {
      const { landscape, colours, simulation, exact, closed } = this, { half, bins } = landscape.view;
      const peak = exact.p.reduce((a, b) => Math.max(a, b), 0), tallest = simulation.bars.reduce((a, b) => Math.max(a, b), 0);
      const high = Math.min(Math.max(1.3 * peak, 1.1 * tallest), 2.4 * peak);
      const what = landscape.dim === 1 ? "density of x" : "density of x₁";
      const map = this.axes(pen, box, `${what}: histogram and exact`, 0, high, true);
      this.clipped(pen, box, () => {
        const width = box.w / bins;
        pen.fillStyle = colours.bead;
        pen.globalAlpha = 0.5;
        if (!simulation.lost) {
          simulation.bars.forEach((bar, bin) => {
            const top = map.up(Math.min(bar, 1.1 * high));
            pen.fillRect(box.x + bin * width + 0.5, top, Math.max(1, width - 1), box.y + box.h - top);
          });
        }
        pen.globalAlpha = 1;
        pen.strokeStyle = colours.ink;
        pen.lineWidth = 2;
        const ends = [-Infinity, Infinity].map((end) => Math.sign(end) * (half + 1));
        this.curve(pen, [ends[0], ...exact.nodes, ends[1]], (_, k) => exact.p[k - 1] ?? 0, map);
        pen.stroke();
        if (closed !== null && Number.isFinite(closed)) {
          const settled = (x) => Math.exp((-x * x) / (2 * closed)) / Math.sqrt(2 * Math.PI * closed);
          pen.strokeStyle = colours.dash;
          pen.setLineDash([7, 5]);
          this.curve(pen, Array.from({ length: 241 }, (_, k) => (k / 120 - 1) * half), settled, map);
          pen.stroke();
          pen.setLineDash([]);
        }
      });
      pen.strokeStyle = colours.muted;
      pen.lineWidth = 1;
      pen.beginPath();
      pen.moveTo(box.x, box.y + box.h);
      pen.lineTo(box.x + box.w, box.y + box.h);
      pen.stroke();
    }
  }

  window.langevinPlayground = { core, instances };
  for (const root of document.querySelectorAll(".langevin-playground")) instances.push(new Playground(root));
  // From now on the still picture is for print only.
  if (instances.length) document.documentElement.classList.add("playground-runs");
})();
