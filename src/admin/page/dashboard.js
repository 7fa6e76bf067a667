'use strict';
const $ = id => document.getElementById(id);
let before = null;

/* Elements are made of text alone, so that no name in the mesh becomes markup. */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}

function put(id, ...children) {
  const held = $(id);
  const focused = held.contains(document.activeElement);
  if (!focused) held.replaceChildren(...children.flat());
}

function table(caption, columns, rows) {
  if (!rows.length) return make('p', { class: 'soft' }, 'None.');
  const number = column => (column.number ? 'number' : column.text ? 'text' : null);
  const head = make('tr', null, columns.map(column => make('th', { scope: 'col', class: number(column) }, column.name)));
  const body = rows.map(row => make('tr', null, columns.map(column => make('td', { class: number(column) }, column.cell(row)))));
  const whole = make('table', null, make('caption', { class: 'soft', hidden: '' }, caption), make('thead', null, head), make('tbody', null, body));
  return make('div', { class: 'wide', tabindex: '0', role: 'region', 'aria-label': caption }, whole);
}

const rounded = n => (n >= 100 ? Math.round(n).toLocaleString() : n >= 10 ? n.toFixed(1) : n.toFixed(2)).replace(/\.?0+$/, '') || '0';
const ms = value => (value === null || value === undefined ? '–' : `${rounded(value)} ms`);
const count = n => n.toLocaleString();
const sum = list => list.reduce((a, b) => a + b, 0);

function bytes(n) {
  for (const unit of ['B', 'kB', 'MB', 'GB']) {
    if (n < 1000 || unit === 'GB') return `${rounded(n)} ${unit}`;
    n /= 1000;
  }
}

function duration(seconds) {
  const s = Math.abs(Math.floor(seconds));
  const [d, h, m] = [Math.floor(s / 86400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}

/* Rates are differences of two states; a counter that started anew counts from zero. */
function rate(now, earlier, seconds) {
  if (earlier === undefined || !seconds) return 0;
  return Math.max(0, now >= earlier ? now - earlier : now) / seconds;
}

function earlier(list, key, entry) {
  return before && before[list].find(other => other[key] === entry[key]);
}

function figures(list, key, entry, seconds) {
  const old = earlier(list, key, entry) || {};
  const errors = entry.http ? `${rounded(rate(entry.classes[4], old.classes && old.classes[4], seconds))} /s` : null;
  const items = entry.http
    ? [['requests', `${rounded(rate(entry.requests, old.requests, seconds))} /s`], ['p50', ms(entry.p50_ms)], ['p99', ms(entry.p99_ms)], ['5xx', errors]]
    : [['connections', `${rounded(rate(entry.connections, old.connections, seconds))} /s`],
       ['in', `${bytes(rate(entry.received, old.received, seconds))}/s`], ['out', `${bytes(rate(entry.sent, old.sent, seconds))}/s`]];
  return make('ul', { class: 'figures' }, items.map(([name, value]) => make('li', null, make('span', { class: 'soft' }, `${name} `), make('b', null, value))));
}

function show(status) {
  const seconds = before ? (status.time - before.time) / 1000 : 0;
  const { sidecar, certificate } = status;
  document.title = `${sidecar.service} · Lictor`;
  $('title').textContent = sidecar.service || 'Sidecar';
  $('state').textContent = sidecar.state;
  $('state').className = sidecar.state === 'LIVE' ? 'good' : 'warn';
  $('about').textContent = `${sidecar.datacenter} · Lictor ${sidecar.version} · up ${duration(sidecar.uptime)} · configuration ${sidecar.configuration}`;
  const left = certificate ? certificate.not_after - status.time / 1000 : null;
  const expiry = left === null ? 'no certificate yet' : left < 0 ? `certificate expired ${duration(left)} ago` : `certificate for ${duration(left)}`;
  const inbound = status.inbound;
  put('self', make('strong', null, sidecar.service || 'Sidecar'),
    make('p', { class: left !== null && left < 3600 ? 'bad' : 'soft' }, expiry),
    make('p', { class: 'soft' }, `${bytes(sidecar.memory)} memory`));
  put('callers', inbound.length ? inbound.map(entry => [
    make('h3', null, `${entry.service} at ${entry.bind} (${entry.protocol})`),
    entry.audit ? make('p', { class: 'badge' }, 'Audit mode: what intentions deny is let through') : null,
    figures('inbound', 'bind', entry, seconds),
    make('ul', { class: 'figures' },
      make('li', null, make('span', { class: 'soft' }, 'allowed '), make('b', { class: 'good' }, count(entry.allowed))),
      make('li', null, make('span', { class: 'soft' }, 'denied '), make('b', { class: entry.denied ? 'bad' : null }, count(entry.denied))),
      entry.audit || entry.would_deny ? make('li', null, make('span', { class: 'soft' }, 'would deny '), make('b', { class: entry.would_deny ? 'warn' : null }, count(entry.would_deny))) : null,
      make('li', null, make('span', { class: 'soft' }, 'open '), make('b', null, count(entry.connections_active)))),
    table('Callers', [
      { name: 'Caller', cell: caller => caller.service },
      { name: 'Allowed', number: true, cell: caller => count(caller.allowed) },
      { name: 'Denied', number: true, cell: caller => count(caller.denied) },
      ...(entry.audit || entry.would_deny ? [{ name: 'Would deny', number: true, cell: caller => count(caller.would_deny) }] : [])], entry.callers),
  ].filter(Boolean)) : make('p', { class: 'soft' }, 'No public listener.'));
  put('called', status.outbound.length ? status.outbound.map(entry =>
    [make('h3', null, `${entry.name} at ${entry.bind}`), figures('outbound', 'key', entry, seconds)]) : make('p', { class: 'soft' }, 'No upstreams.'));
  put('upstreams', status.outbound.length ? status.outbound.map(upstream) : make('p', { class: 'soft' }, 'None.'));
  put('intentions', inbound.map(entry => [
    make('p', null, `Without a match: ${entry.default}.`),
    table(`Intentions for ${entry.service}`, [
      { name: 'Source', cell: rule => rule.source },
      { name: 'Destination', cell: rule => rule.destination },
      { name: 'Action', cell: rule => make('span', { class: rule.action === 'deny' ? 'bad' : 'good' }, rule.action) },
      { name: 'Precedence', number: true, cell: rule => count(rule.precedence) }], entry.intentions)]));
  const newest = before && before.problems.length ? before.problems[0].number : -1;
  put('events', table('Recent denials and failures', [
    { name: 'When', cell: problem => new Date(problem.time).toLocaleTimeString() },
    { name: 'Where', cell: problem => `${problem.direction} ${problem.listener}` },
    { name: 'Who', cell: problem => problem.who },
    { name: 'Reason', cell: problem => make('span', { class: problem.number > newest && before ? 'fresh' : null }, problem.flag ? `${problem.reason} (${problem.flag})` : problem.reason) },
    { name: 'What and why', text: true, cell: problem => [problem.what ? `${problem.what}: ` : '', problem.cause].join('') },
    { name: 'What to do', text: true, cell: problem => problem.remedy }], status.problems.slice(0, 50)));
  choices(status.outbound);
  before = status;
}

function upstream(entry) {
  const http = entry.http ? ` · ${entry.classes.map((n, i) => (n ? `${i + 1}xx ${count(n)}` : null)).filter(Boolean).join(' · ') || 'no answers yet'}` : '';
  return [make('h3', null, entry.name), make('p', { class: 'soft' }, `${entry.bind} · ${entry.protocol}${http}`), entry.targets.map(target =>
    [make('p', null, make('strong', null, target.id), make('span', { class: 'soft' },
      ` · ${count(target.retries)} retries · ${count(target.timeouts)} timeouts · ${count(target.connect_failures)} failed connects`)),
    table(`Endpoints of ${target.id}`, [
      { name: 'Endpoint', cell: endpoint => endpoint.address },
      { name: 'State', cell: endpoint => make('span', { class: endpoint.state === 'healthy' ? 'good' : 'bad' }, endpoint.state) },
      { name: 'In flight', number: true, cell: endpoint => count(endpoint.in_flight) },
      { name: 'Latency', number: true, cell: endpoint => ms(endpoint.latency_ms) }], target.endpoints)])];
}

function choices(outbound) {
  const select = document.querySelector('#explain select');
  const names = outbound.map(entry => entry.name);
  if ([...select.options].map(option => option.value).join('\n') === names.join('\n')) return;
  const chosen = select.value;
  select.replaceChildren(...names.map(name => make('option', null, name)));
  if (names.includes(chosen)) select.value = chosen;
}

$('explain').addEventListener('submit', async event => {
  event.preventDefault();
  const form = new FormData(event.target);
  const query = new URLSearchParams({ upstream: form.get('upstream') || '', method: form.get('method'), path: form.get('path') });
  if (form.get('header')) query.append('header', form.get('header'));
  try {
    const answer = await fetch(`/explain?${query}`);
    $('route').textContent = await answer.text();
  } catch (error) {
    $('route').textContent = `The sidecar does not answer: ${error.message}`;
  }
});

const events = new EventSource('/events');
events.onmessage = message => { show(JSON.parse(message.data)); $('live').textContent = 'live'; };
events.onerror = () => { $('live').textContent = 'not connected: trying again'; };
