'use strict';
const $ = id => document.getElementById(id);
const SVG = $('edges').namespaceURI;
/* The states of the last minute, oldest first. */
const past = [];
const MINUTE = 60, MOMENT = 5, NODES = 12;

/* Elements are made of text alone, so that no name in the mesh becomes markup. */
function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(3).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}
const make = (tag, attributes, ...children) => made(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => made(document.createElementNS(SVG, tag), attributes, children);

/* Makes what is shown like what is wanted, and leaves alone what is so already: focus, selection and readers stay where they are. */
function patch(held, wanted) {
  wanted.forEach((node, place) => {
    const old = held.childNodes[place];
    if (!old) held.append(node);
    else if (old.nodeName !== node.nodeName || (old.dataset && old.dataset.key !== node.dataset.key)) old.replaceWith(node);
    else if (node.nodeType === Node.TEXT_NODE) { if (old.data !== node.data) old.data = node.data; }
    else {
      for (const { name } of [...old.attributes]) if (!node.hasAttribute(name) && name !== 'open') old.removeAttribute(name);
      for (const { name, value } of node.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
      patch(old, [...node.childNodes]);
    }
  });
  while (held.childNodes.length > wanted.length) held.lastChild.remove();
}
const put = (id, ...children) => patch($(id), [...make('div', null, children).childNodes]);

const NONE = '–';
const count = n => (n === null || n === undefined ? NONE : Number(n).toLocaleString('en'));
const some = n => (n >= 99.95 ? Math.round(n).toLocaleString('en') : n.toFixed(n >= 9.95 ? 1 : 2).replace(/\.?0+$/, ''));
const ms = value => (value === null || value === undefined ? NONE : `${some(value)} ms`);
const sum = list => list.reduce((a, b) => a + b, 0);
const words = (n, one, many) => `${count(n)} ${n === 1 ? one : many || `${one}s`}`;
const percent = share => (share > 0 && share < 0.001 ? '< 0.1 %' : `${some(share * 100)} %`);
const clock = time => new Date(time).toLocaleTimeString('en-GB');

function bytes(n) {
  for (const unit of ['B', 'kB', 'MB', 'GB']) {
    if (n < 1000 || unit === 'GB') return `${some(n)} ${unit}`;
    n /= 1000;
  }
}

function duration(seconds) {
  const s = Math.abs(Math.floor(seconds));
  const [d, h, m] = [Math.floor(s / 86400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}

/* What a counter gained between two states; one that started anew counts from zero. */
function gained(of, from, to) {
  const [a, b] = [of(from), of(to)];
  return b === undefined || a === undefined ? 0 : b >= a ? b - a : b;
}
const now = () => past[past.length - 1];
const before = seconds => past[Math.max(0, past.length - 1 - seconds)];
const gain = (of, seconds) => gained(of, before(seconds), now());
function rate(of) {
  const seconds = (now().time - before(MOMENT).time) / 1000;
  return seconds > 0 ? gain(of, MOMENT) / seconds : 0;
}

/* Finders of one counter in any state. */
const inList = (list, key, entry, of) => state => {
  const found = (state[list] || []).find(other => other[key] === entry[key]);
  return found && of(found);
};
const inbound = (entry, of) => inList('inbound', 'bind', entry, of);
const outbound = (entry, of) => inList('outbound', 'key', entry, of);
const ofCaller = (entry, caller, of) => inbound(entry, listener => {
  const found = (listener.callers || []).find(other => other.service === caller.service);
  return found ? of(found) : 0;
});

function spark(of, label) {
  const rates = past.slice(1).map((state, at) => gained(of, past[at], state) / Math.max(0.5, (state.time - past[at].time) / 1000));
  const top = Math.max(1, ...rates);
  const points = rates.map((value, at) => `${MINUTE - rates.length + at + 1},${(19 - 18 * value / top).toFixed(1)}`).join(' ');
  return draw('svg', { class: 'spark', viewBox: `0 0 ${MINUTE} 20`, preserveAspectRatio: 'none', role: 'img', 'aria-label': `${label}, the last minute` },
    draw('polyline', { points, 'vector-effect': 'non-scaling-stroke' }));
}

const figure = (name, value, kind) => make('li', null, make('span', { class: 'soft' }, `${name} `), make('b', { class: kind }, value));

function traffic(entry, of) {
  if (!entry.http) {
    return make('ul', { class: 'figures' }, figure('connections', `${some(rate(of(e => e.connections)))} /s`), figure('open', count(entry.connections_active)),
      figure('in', `${bytes(rate(of(e => e.received)))}/s`), figure('out', `${bytes(rate(of(e => e.sent)))}/s`));
  }
  const share = failing(entry, of);
  return make('ul', { class: 'figures' }, figure('requests', `${some(rate(of(e => e.requests)))} /s`), figure('p50', ms(quantile(of, 0.5))), figure('p99', ms(quantile(of, 0.99))),
    figure('errors', percent(share), share > 0.05 ? 'bad' : share > 0 ? 'warn' : null));
}
/* Milliseconds that so large a share of the requests of the last minute took at most, linear within a bucket; null without a request. */
function quantile(of, share) {
  const { bounds_ms: bounds } = now();
  const counts = [...bounds, null].map((_, bucket) => gain(of(e => (e.times || [])[bucket] || 0), MINUTE));
  const rank = Math.max(1, Math.ceil(share * sum(counts)));
  let below = 0;
  for (const [bucket, n] of counts.entries()) {
    const low = bucket ? bounds[bucket - 1] : 0;
    if (n && below + n >= rank) return low + ((bounds[bucket] || low) - low) * (rank - below) / n;
    below += n;
  }
  return null;
}
const main = entry => (entry.http ? e => e.requests : e => e.connections);

/* The share of answers of class 5 in the last minute. */
function failing(entry, of) {
  const all = gain(of(e => sum(e.classes)), MINUTE);
  return entry.http && all ? gain(of(e => e.classes[4]), MINUTE) / all : 0;
}

const isUsed = endpoint => endpoint.state === 'healthy' || endpoint.state === 'probed';
const kindOf = endpoint => (endpoint.state === 'healthy' ? 'good' : endpoint.state === 'probed' ? 'warn' : 'bad');
const endpoints = entry => entry.targets.flatMap(target => target.endpoints);

function callers() {
  const all = now().inbound.flatMap(entry => (entry.callers || []).map(caller => {
    const of = pick => ofCaller(entry, caller, pick);
    const denied = gain(of(c => c.denied), MINUTE);
    return { entry, caller, of, kind: denied ? (gain(of(c => c.allowed), MINUTE) ? 'warn' : 'bad') : '', rate: rate(of(c => c.allowed + c.denied)) };
  })).sort((a, b) => b.caller.allowed + b.caller.denied - a.caller.allowed - a.caller.denied);
  put('callers', all.slice(0, NODES).map(({ entry, caller, of, kind, rate: perSecond }) => make('li', {
    class: `node ${kind}`, 'data-key': caller.service, 'data-rate': perSecond.toFixed(2), 'data-kind': kind },
  make('span', { class: 'name' }, caller.service),
  make('ul', { class: 'figures' }, figure(entry.http ? 'requests' : 'connections', `${some(perSecond)} /s`), figure('allowed', count(caller.allowed)),
    figure('denied', count(caller.denied), caller.denied ? 'bad' : null), caller.would_deny ? figure('would be denied', count(caller.would_deny), 'warn') : null),
  spark(of(c => c.allowed + c.denied), `Traffic of ${caller.service}`))),
  all.length > NODES ? make('li', { class: 'soft' }, `and ${all.length - NODES} more`) : null,
  all.length ? null : make('li', { class: 'soft' }, now().inbound.length ? 'Nobody has called yet.' : 'It has no public listener.'));
}

function called() {
  const upstreams = now().outbound;
  put('called', upstreams.slice(0, NODES).map(entry => {
    const of = pick => outbound(entry, pick);
    const dead = isDead(entry), share = failing(entry, of), all = endpoints(entry), used = all.filter(isUsed).length;
    const kind = dead || share > 0.05 ? 'bad' : share > 0 || used < all.length ? 'warn' : '';
    return make('li', { class: `node ${kind}`, 'data-key': entry.key, 'data-rate': rate(of(main(entry))).toFixed(2), 'data-kind': kind },
      make('span', { class: 'name' }, entry.name), make('span', { class: 'soft' }, `${entry.bind} · ${entry.protocol} `),
      make('span', { class: `count ${dead ? 'bad' : 'soft'}` }, make('span', { class: 'dots' }, all.slice(0, 20).map(each => draw('svg', { class: `dot ${kindOf(each)}`, viewBox: '0 0 10 10', 'aria-hidden': 'true' },
        draw('circle', { cx: 5, cy: 5, r: 5 })))), dead ? ' no usable instance' : ` ${used < all.length ? `${used} of ` : ''}${words(all.length, 'instance')}`),
      traffic(entry, of), spark(of(main(entry)), `Traffic to ${entry.name}`));
  }), upstreams.length > NODES ? make('li', { class: 'soft' }, `and ${upstreams.length - NODES} more`) : null, upstreams.length ? null : make('li', { class: 'soft' }, 'It calls nobody.'));
}
const isDead = entry => !entry.waits_for_agent && entry.targets.length > 0 && !endpoints(entry).some(isUsed);

function ring(share, kind) {
  return draw('svg', { class: 'ring', viewBox: '0 0 40 40', 'aria-hidden': 'true' }, draw('circle', { cx: 20, cy: 20, r: 17 }),
    draw('circle', { class: `left ${kind}`, cx: 20, cy: 20, r: 17, pathLength: 100, 'stroke-dasharray': `${Math.round(100 * share)} 100`, transform: 'rotate(-90 20 20)' }));
}

function certificate() {
  const held = now().certificate;
  if (!held) return null;
  const left = held.not_after - now().time / 1000;
  const kind = left < 3600 ? 'bad' : left < 12 * 3600 ? 'warn' : '';
  return { left, kind, ring: ring(Math.max(0, Math.min(1, left / (held.not_after - held.not_before))), kind), text: left < 0 ? `expired ${duration(left)} ago` : `valid for ${duration(left)}` };
}

function self() {
  const { sidecar } = now();
  const held = certificate();
  put('self', make('div', { class: 'name' }, sidecar.service || 'Sidecar'),
    now().inbound.map(entry => [make('div', { class: 'soft' }, `${entry.bind} · ${entry.protocol}`), entry.audit ? make('p', null, make('span', { class: 'pill warn' }, 'audit mode: denies nothing')) : null,
      traffic(entry, pick => inbound(entry, pick)),
      make('ul', { class: 'figures' }, figure('allowed', count(entry.allowed), 'good'), figure('denied', count(entry.denied), entry.denied ? 'bad' : null),
        entry.audit || entry.would_deny ? figure('would deny', count(entry.would_deny), 'warn') : null, figure('open', count(entry.connections_active)),
        entry.revoked ? figure('revoked', count(entry.revoked)) : null),
      spark(inbound(entry, main(entry)), 'Traffic to this service')]),
    make('div', { class: 'certificate' }, held ? held.ring : null, make('div', { class: held ? held.kind : 'warn' }, held ? ['Certificate', make('br'), held.text] : 'no certificate yet')));
}

/* Lines between the boxes, as wide as there is traffic. */
function edges() {
  const whole = $('edges').getBoundingClientRect(), middle = $('self').getBoundingClientRect();
  if (!whole.width) return;
  const lines = [['callers', 'right', 'left'], ['called', 'left', 'right']].flatMap(([id, near, far]) => [...$(id).querySelectorAll('.node')].map((node, at, all) => {
    const box = node.getBoundingClientRect(), perSecond = Number(node.dataset.rate);
    const [x, y] = [box[near] - whole.left, box.top + box.height / 2 - whole.top];
    const [u, v] = [middle[far] - whole.left, middle.top - whole.top + middle.height * (0.5 + 0.5 * ((at + 0.5) / all.length - 0.5))];
    const [a, b] = id === 'callers' ? [[x, y], [u, v]] : [[u, v], [x, y]];
    const half = (a[0] + b[0]) / 2;
    const d = `M${a.map(Math.round)}C${Math.round(half)},${Math.round(a[1])} ${Math.round(half)},${Math.round(b[1])} ${b.map(Math.round)}`;
    const width = (1.5 + Math.min(5, 1.2 * Math.log2(1 + perSecond))).toFixed(1);
    return [draw('path', { class: perSecond ? node.dataset.kind : 'idle', d, 'stroke-width': width, opacity: '.35' }),
      draw('path', { class: `${node.dataset.kind} ${perSecond ? 'moving' : 'idle'}`, d, 'stroke-width': width })];
  }));
  patch($('edges'), lines.flat());
}

/* What needs attention, in words that stay the same as long as it does: they are read aloud when they change. */
function findings() {
  const { sidecar, outbound: upstreams, inbound: listeners, problems } = now();
  const found = [];
  const tell = (kind, what, why) => found.push({ kind, what, why });
  if (sidecar.state !== 'LIVE') tell('bad', `The sidecar does not serve: ${sidecar.state}.`, 'Readiness, below, says what is missing.');
  const held = certificate();
  if (held && held.kind) tell(held.kind, held.left < 0 ? 'The certificate has expired.' : 'The certificate ends soon.', 'The agent should have renewed it: see the queries of the agent and the log.');
  for (const entry of upstreams) {
    const last = problems.find(problem => problem.direction === 'outbound' && problem.listener === entry.name);
    const open = endpoints(entry).filter(each => !isUsed(each));
    if (entry.waits_for_agent) tell('warn', `No discovery chain received yet for upstream ${entry.name}.`, '');
    else if (isDead(entry)) tell('bad', `${entry.name} has no usable instance.`, last ? last.cause : 'None is registered, or none passes its checks.');
    else if (open.length) tell('warn', `${entry.name}: ${open.map(each => `${each.address} is ${each.state}`).join(', ')}.`, 'It is passed over until it answers again.');
    const share = failing(entry, pick => outbound(entry, pick));
    if (share > 0.05 && !isDead(entry)) tell('bad', `More than ${share > 0.5 ? 50 : share > 0.2 ? 20 : 5} % of the requests to ${entry.name} fail.`, 'With status 5xx, in the last minute.');
    for (const target of entry.targets) {
      for (const [name, limit] of Object.entries(target.limits || {})) if (limit.open) tell('warn', `The limit of ${name.replace('_', ' ')} to ${target.service} is reached.`, 'Raise it, or add instances.');
    }
  }
  for (const entry of listeners) {
    if (entry.audit) tell('warn', 'Audit mode: what intentions deny is let through.', 'Turn it off when the intentions are as they should be.');
    for (const caller of entry.callers || []) {
      if (!gain(ofCaller(entry, caller, c => c.denied), MINUTE)) continue;
      const last = problems.find(problem => problem.reason === 'Denied' && problem.who === caller.service);
      tell('warn', `${caller.service} is being denied.`, last ? `By ${last.cause}.` : '');
    }
  }
  for (const watch of (now().watches || []).filter(each => each.failing)) tell('warn', `The agent does not answer: ${watch.what}.`, watch.error || '');
  return found;
}

function verdict() {
  const found = findings();
  put('verdict', make('ul', null, found.length ? found.slice(0, 8).map(({ kind, what, why }) => make('li', { class: kind }, make('strong', null, what), why ? make('span', null, why) : null))
    : make('li', null, make('strong', { class: 'good' }, 'Nothing needs attention.'))));
  document.title = `${found.length ? `(${found.length}) ` : ''}${now().sidecar.service || 'Sidecar'} · Lictor`;
}

function table(caption, columns, rows, hidden) {
  if (!rows.length) return make('p', { class: 'soft' }, `${caption}: none.`);
  const shown = columns.filter(column => !column.if || rows.some(column.if));
  const kind = column => (column.number ? 'number' : null);
  /* The roles are said, as a table that is laid out otherwise on small screens loses them. */
  return make('table', { role: 'table' }, make('caption', { class: hidden ? 'soft' : null }, caption),
    make('thead', { role: 'rowgroup' }, make('tr', { role: 'row' }, shown.map(column => make('th', { scope: 'col', role: 'columnheader', class: kind(column) }, column.name)))),
    make('tbody', { role: 'rowgroup' }, rows.map(row => make('tr', { role: 'row' }, shown.map(column => make('td', { role: 'cell', class: kind(column), 'data-name': column.name }, make('span', null, column.cell(row))))))));
}
const pill = (kind, text) => make('span', { class: `pill ${kind}` }, text);

function upstreams() {
  const slowest = Math.max(1, ...now().outbound.flatMap(endpoints).map(each => each.latency_ms || 0));
  const known = value => each => value(each) !== undefined && value(each) !== null;
  put('upstreams', now().outbound.length ? now().outbound.flatMap(entry => entry.targets.map(target => make('div', { class: 'group', 'data-key': `${entry.key} ${target.id}` },
    !target.endpoints.length ? [make('h3', null, target.id), make('p', { class: 'bad' }, `No usable instance of ${count(target.registered)} registered.`)] : table(`${entry.name === target.service ? '' : `${entry.name} → `}${target.id}`, [
      { name: 'Instance', cell: each => each.address },
      { name: 'Health', cell: each => pill(kindOf(each), each.state) },
      { name: 'Breaker', if: known(each => each.breaker), cell: each => each.breaker || NONE },
      { name: 'Weight', number: true, cell: each => count(each.weight) },
      { name: 'In flight', number: true, cell: each => count(each.in_flight) },
      { name: 'Latency', number: true, cell: each => [ms(each.latency_ms), draw('svg', { class: 'bar', viewBox: '0 0 64 8', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
        draw('rect', { class: 'all', width: 64, height: 8, rx: 4 }), draw('rect', { width: Math.round(64 * (each.latency_ms || 0) / slowest), height: 8, rx: 4 }))] }], target.endpoints),
    make('ul', { class: 'figures' }, figure('registered', count(target.registered)), figure('tries', count(target.tries)), figure('retries', count(target.retries)),
      figure('timeouts', count(target.timeouts), target.timeouts ? 'warn' : null), figure('failed connects', count(target.connect_failures), target.connect_failures ? 'warn' : null),
      figure('overflows', count(target.overflows), target.overflows ? 'bad' : null), target.ejections === undefined ? null : figure('ejections', count(target.ejections), target.ejections ? 'warn' : null),
      Object.entries(target.limits || {}).filter(([, limit]) => limit.maximum).map(([name, limit]) => figure(name.replace('_', ' '), `${count(limit.used)} of ${count(limit.maximum)}`, limit.open ? 'bad' : null))))))
    : make('p', { class: 'soft' }, 'It has no upstreams.'));
}

function intentions() {
  const known = each => each.allowed !== undefined && each.allowed !== null;
  put('intentions', now().inbound.map(entry => [
    table(`Those that hold for ${entry.service}, in the order in which they are tried`, [
      { name: 'Source', cell: rule => rule.source },
      { name: 'Action', cell: rule => pill(rule.action === 'deny' ? 'bad' : rule.action === 'allow' ? 'good' : '', rule.action) },
      { name: 'Precedence', number: true, cell: rule => count(rule.precedence) },
      { name: 'Allowed', if: known, number: true, cell: rule => count(rule.allowed) },
      { name: 'Denied', if: known, number: true, cell: rule => make('span', { class: rule.denied ? 'bad' : null }, count(rule.denied)) }], entry.intentions, true),
    make('p', { class: 'soft' }, `Without a match: ${entry.default}`, entry.default_allowed === undefined ? '.' : `: ${count(entry.default_allowed)} allowed, ${count(entry.default_denied)} denied.`)]));
}

function identity() {
  const held = certificate(), { sidecar } = now();
  const rows = [['Memory', bytes(sidecar.memory)], ['Running for', duration(sidecar.uptime)], ['Configuration', `number ${count(sidecar.configuration)}`], ['Admin server', sidecar.admin]];
  put('certificate', held ? make('div', { class: 'certificate' }, held.ring, make('div', null, make('strong', { class: held.kind }, `It is ${held.text}.`),
    make('p', { class: 'soft' }, `from ${new Date(now().certificate.not_before * 1000).toLocaleString('en-GB')} to ${new Date(now().certificate.not_after * 1000).toLocaleString('en-GB')}`))) : make('p', { class: 'warn' }, 'There is none yet.'),
  held ? make('p', null, now().certificate.uri) : null,
  make('dl', { class: 'settings' }, rows.filter(([, value]) => value).map(([name, value]) => [make('dt', null, name), make('dd', null, value)])));
}

let all = false;
function events() {
  const groups = new Map();
  for (const problem of now().problems) {
    /* Ports of apps differ each time, and say nothing. */
    const who = problem.direction === 'outbound' ? '' : problem.who;
    const key = [problem.reason, problem.direction, problem.listener, who, problem.what, problem.cause].join('\n');
    const group = groups.get(key);
    if (group) group.times += 1; else groups.set(key, { ...problem, who, key, times: 1 });
  }
  const known = past.length > 1 ? new Set(past[past.length - 2].problems.map(problem => problem.number)) : null;
  const list = [...groups.values()];
  put('events', list.length ? make('ul', { class: 'events' }, list.slice(0, all ? list.length : 6).map(event => make('li', { 'data-key': event.key, class: known && !known.has(event.number) ? 'fresh' : null },
    make('div', null, make('span', { class: `pill ${event.reason === 'Denied' ? 'bad' : 'warn'}` }, event.reason), event.flag ? make('span', { class: 'soft' }, ` ${event.flag}`) : null,
      make('div', { class: 'soft' }, clock(event.time), event.times > 1 ? ` · ${words(event.times, 'time')}` : null)),
    make('div', null, make('strong', null, event.direction === 'outbound' ? `To ${event.listener}` : [event.who || 'Someone', ' to ', event.listener], event.what ? `: ${event.what}` : null),
      make('p', null, event.cause), make('p', { class: 'soft' }, 'What to do: ', event.remedy)))))
    : make('p', { class: 'soft' }, 'None since the start.'),
  list.length > 6 ? make('button', { type: 'button', class: 'plain', 'data-more': '' }, all ? 'Show fewer' : `Show all ${list.length}`) : null);
}
$('events').addEventListener('click', event => { if ('more' in event.target.dataset) { all = !all; events(); } });

function watches() {
  const list = now().watches || [];
  $('watching').hidden = !list.length;
  const agent = now().agent;
  const failing = list.filter(watch => watch.failing).length;
  put('watches', make('details', null, make('summary', null, `${words(list.length, 'query', 'queries')}${agent && agent.address ? ` to ${agent.address}` : ''}, `, pill(failing ? 'bad' : 'good', failing ? `${failing} failing` : 'all answered')), table('What the agent is asked', [
    { name: 'What', cell: watch => watch.what || watch.kind },
    { name: 'How', cell: watch => watch.how || NONE },
    { name: 'State', cell: watch => pill(watch.failing ? 'bad' : 'good', watch.failing ? 'failing' : 'ok') },
    { name: 'Answered', number: true, cell: watch => (watch.age === null || watch.age === undefined ? 'not yet' : `${duration(watch.age)} ago`) },
    { name: 'Index', number: true, cell: watch => count(watch.index) },
    { name: 'Last error', if: watch => watch.error, cell: watch => (watch.error ? `${watch.error}${watch.error_age === undefined ? '' : ` (${duration(watch.error_age)} ago)`}` : NONE) }], list, true)));
}

function show(status) {
  past.push(status);
  if (past.length > MINUTE + 1) past.shift();
  const { sidecar } = status;
  $('title').textContent = sidecar.service || 'Sidecar';
  $('state').textContent = sidecar.state;
  $('state').className = `pill ${sidecar.state === 'LIVE' ? 'good' : 'warn'}`;
  put('about', `${sidecar.datacenter} · Lictor ${sidecar.version} · up ${duration(sidecar.uptime)}`);
  for (const part of [verdict, callers, called, self, events, upstreams, intentions, identity, watches, edges]) part();
  choices(status.outbound);
}

/* The route of a request */
function choices(upstreams) {
  const select = document.querySelector('#explain select');
  const names = upstreams.map(entry => entry.name);
  if ([...select.options].map(option => option.value).join('\n') === names.join('\n')) return;
  const chosen = select.value;
  select.replaceChildren(...names.map(name => make('option', null, name)));
  if (names.includes(chosen)) select.value = chosen;
  if (names.length) explain(); else put('route', make('p', { class: 'soft' }, 'It has no upstreams.'));
}

const box = (kind, at, ...children) => make('li', { class: kind }, make('div', { class: 'at' }, at), children);
const from = setting => (setting && setting.from ? make('div', { class: 'soft' }, setting.from) : null);

function target(each, place) {
  const used = each.endpoints.filter(isUsed).length;
  return box(`${used ? '' : 'bad'} ${place ? 'fallback' : ''}`, place ? 'if that fails' : 'target', make('strong', null, each.id),
    each.endpoints.map(one => make('div', null, pill(kindOf(one), one.state), ` ${one.address} `, make('span', { class: 'soft' }, one.latency_ms ? ms(one.latency_ms) : ''))),
    each.endpoints.length ? null : make('div', { class: 'bad' }, `no usable instance of ${each.registered} registered`));
}

function route(told) {
  const ways = told.ways || [];
  const legs = ways.map(way => make('ol', { class: 'flow' }, ways.length > 1 ? box('', 'share', make('strong', null, `${some(way.share)} %`)) : null,
    way.resolver ? box('', way.resolver.at || 'resolver', make('div', null, way.resolver.says), from(way.resolver)) : null,
    way.balancer && way.balancer.value ? box('', 'balancer', make('div', null, way.balancer.value), from(way.balancer)) : null, (way.targets || []).map(target)));
  const settings = [...(told.settings || [])];
  return [make('ol', { class: 'flow' }, box('app', 'app', make('strong', null, told.request || 'connection'), make('div', { class: 'soft' }, `at ${told.bind}`)),
    told.protocol && told.protocol.value ? box('', 'upstream', make('div', null, `${told.upstream} (${told.protocol.value})`), from(told.protocol)) : null,
    (told.steps || []).map(step => box('', step.at, make('div', null, step.says), from(step)))),
  legs.length ? make('ul', { class: 'ways' }, legs.map(leg => make('li', null, leg))) : null,
  told.fault ? make('p', { class: 'bad' }, make('strong', null, told.fault)) : null,
  settings.length ? make('dl', { class: 'settings' }, settings.map(([name, setting]) => [make('dt', null, name), make('dd', null, `${setting.value} `, make('span', { class: 'soft' }, setting.from))])) : null];
}

let asked = 0;
async function explain() {
  const form = new FormData($('explain')), number = ++asked;
  const query = new URLSearchParams({ upstream: form.get('upstream') || '', method: form.get('method'), path: form.get('path'), format: 'json' });
  if (form.get('header')) query.append('header', form.get('header'));
  let drawn;
  try {
    const answer = await fetch(`/explain?${query}`);
    const text = await answer.text();
    drawn = (answer.headers.get('content-type') || '').includes('json') ? route(JSON.parse(text)) : [make('pre', null, text)];
  } catch (error) {
    drawn = [make('p', { class: 'bad' }, `The sidecar does not answer: ${error.message}`)];
  }
  if (number === asked) put('route', drawn);
}
$('explain').addEventListener('submit', event => { event.preventDefault(); explain(); });
$('explain').addEventListener('change', event => { if (event.target.name === 'upstream') explain(); });
addEventListener('resize', edges);

const stream = new EventSource('/events');
function connected(is) {
  const live = $('live');
  if (live.textContent !== (is ? 'live' : 'not connected')) live.textContent = is ? 'live' : 'not connected';
  live.className = `pill ${is ? 'good' : 'bad'}`;
  $('main').className = is ? '' : 'stale';
}
stream.onmessage = message => { connected(true); show(JSON.parse(message.data)); };
stream.onerror = () => connected(false);
