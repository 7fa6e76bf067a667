/* load.c - everything the Python beside it needs on the data path, in one small binary:
 *
 *   load origin PORT                  the application: HTTP/1.1, HTTP/2 (prior knowledge,
 *                                     gRPC shaped), bulk source and bulk sink on one port
 *   load http   PORT CONNS SECS SIZE RATE   keep-alive HTTP/1.1 (RATE 0 = closed loop,
 *                                     else open loop at RATE/s, latency from the intended time)
 *   load h2     PORT CONNS STREAMS SECS     gRPC shaped unary calls over HTTP/2
 *   load streams PORT CONNS STREAMS SECS RATE E|P   gRPC shaped calls that stay open: each stream
 *                                     sends RATE messages of 64 bytes a second and gets them back (E),
 *                                     or is sent as many by the server (P)
 *   load put    PORT CONNS SECS SIZE  keep-alive HTTP/1.1, each request with a body of SIZE bytes
 *   load churn  PORT CONNS SECS SIZE  one new TCP connection per request
 *   load bulk   PORT STREAMS SECS D|U|B  bulk transfer, goodput at the receiver
 *   load idle   PORT CONNS            opens CONNS, one request each, holds, checks all again
 *   load relay  LISTEN TO rw|splice   plain two-socket relay, the no-TLS floor
 *   load delay  LISTEN TO MS          a relay that delivers every byte MS later, each way: a long path
 *   load limits                       memcpy, syscall and loopback facts
 *
 * Every byte that comes back is checked against a known pattern; any fault is
 * counted in "errors" and the Python beside it then refuses to print the figure.
 * Loads connect and prepare first, print {"ready":1}, wait for a line on stdin,
 * run, print one JSON line.  Single thread, epoll, Linux only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MARK "LICTOR-BENCH-PLAIN-TEXT-MARKER--" /* 32 bytes */
#define PATN (1 << 20)
#define BLK 4096
#define CHUNK (256 * 1024)
#define H2BODY 1024

static char pat[PATN + 64];
static char h2msg[H2BODY];

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}
static void die(const char *m) { perror(m); exit(2); }
static void nb(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }
static void nodelay(int fd) { int one = 1; setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); }

static int dial_start(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    nodelay(fd);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (void *)&a, sizeof a) < 0 && errno != EINPROGRESS) { close(fd); return -1; }
    return fd;
}
static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (void *)&a, sizeof a) < 0) die("bind");
    if (listen(fd, 4096) < 0) die("listen");
    return fd;
}
static void ep(int e, int op, int fd, uint32_t ev, void *p) {
    struct epoll_event x = {.events = ev, .data.ptr = p};
    if (epoll_ctl(e, op, fd, &x) < 0) die("epoll_ctl");
}

/* ---------- histogram, about 1.6 % resolution ---------- */
static uint64_t hist[4096], hn, hmax;
static double hsum;
static int hidx(uint64_t v) {
    if (v < 64) return (int)v;
    int e = 63 - __builtin_clzll(v);
    return (e - 5) * 64 + (int)((v >> (e - 6)) & 63);
}
static double hval(int i) {
    if (i < 64) return i;
    int e = i / 64 + 5;
    return (double)((uint64_t)(64 + i % 64) << (e - 6)) + (double)(1ull << (e - 6)) / 2;
}
static void hadd(uint64_t ns) { hist[hidx(ns)]++; hn++; hsum += (double)ns; if (ns > hmax) hmax = ns; }
static double hq(double q) {
    uint64_t want = (uint64_t)(q * (double)hn), c = 0;
    for (int i = 0; i < 4096; i++) { c += hist[i]; if (c > want) return hval(i) / 1000.0; }
    return (double)hmax / 1000.0;
}
static void hreset(void) { memset(hist, 0, sizeof hist); hn = 0; hsum = 0; hmax = 0; }
static void hprint(void) {
    printf("\"p50_us\":%.2f,\"p90_us\":%.2f,\"p99_us\":%.2f,\"p999_us\":%.2f,\"max_us\":%.1f,\"mean_us\":%.2f",
           hq(.5), hq(.9), hq(.99), hq(.999), (double)hmax / 1000.0, hn ? hsum / (double)hn / 1000.0 : 0.0);
}
static double cpu_self(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}
static double cpu_at_go;
static void ready_go(void) {
    char line[64];
    printf("{\"ready\":1}\n");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin)) exit(3);
    cpu_at_go = cpu_self();
}
static void put_cpu(void) { printf("\"load_cpu\":%.4f,", cpu_self() - cpu_at_go); }
static const char *first_err = "";
static uint64_t errors;
static void fault(const char *why) { errors++; if (!*first_err) first_err = why; }

/* ================= origin ================= */
enum { K_NEW, K_HTTP, K_H2, K_SRC, K_SINK };
typedef struct oc {
    int fd, kind, want_out, last; /* last: HTTP/1.0, whose answer ends with the connection */
    char *in; size_t inlen, incap;
    char *out; size_t outoff, outlen, outcap; /* pending output */
    const char *body; size_t bodyleft;        /* then this */
    uint64_t more, upload;                    /* of the body, after that; of a request's body, still to come */
    uint64_t blk, got, acked;                 /* bulk */
    int64_t cwnd; uint64_t rx;                /* h2 */
    uint32_t *q; size_t qh, qt, qcap;
    unsigned char *open; /* calls that stay open, by stream: 'E' or 'P' */
    uint32_t *push; size_t npush, pushcap; int rate; /* those of 'P', and their messages a second */
    struct oc *next_push, *prev_push;
} oc;
static uint64_t st_accepted, st_requests, st_bulk, st_open, st_bad;
static oc *pushers; /* connections with calls that are sent messages */

static void o_free(int e, oc *c) {
    (void)e;
    close(c->fd);
    if (c->npush || c->pushcap) {
        if (c->prev_push) c->prev_push->next_push = c->next_push; else pushers = c->next_push;
        if (c->next_push) c->next_push->prev_push = c->prev_push;
    }
    free(c->in); free(c->out); free(c->q); free(c->open); free(c->push); free(c);
    st_open--;
}
static void o_put(oc *c, const void *p, size_t n) {
    if (c->outoff == c->outlen) c->outoff = c->outlen = 0;
    if (c->outlen + n > c->outcap) {
        c->outcap = (c->outlen + n) * 2 + 512;
        c->out = realloc(c->out, c->outcap);
    }
    memcpy(c->out + c->outlen, p, n);
    c->outlen += n;
}
/* returns -1 dead, 0 would block, 1 drained */
static int o_flush(oc *c) {
    while (c->outoff < c->outlen || c->bodyleft || c->more) {
        if (!c->bodyleft && c->more) { c->body = pat; c->bodyleft = c->more < PATN ? c->more : PATN; c->more -= c->bodyleft; }
        struct iovec v[2]; int k = 0;
        if (c->outoff < c->outlen) v[k++] = (struct iovec){c->out + c->outoff, c->outlen - c->outoff};
        if (c->bodyleft) v[k++] = (struct iovec){(void *)c->body, c->bodyleft};
        struct msghdr m = {.msg_iov = v, .msg_iovlen = k};
        ssize_t n = sendmsg(c->fd, &m, MSG_NOSIGNAL);
        if (n < 0) return errno == EAGAIN ? 0 : -1;
        size_t h = c->outlen - c->outoff, u = (size_t)n;
        if (u < h) { c->outoff += u; continue; }
        c->outoff = c->outlen; u -= h;
        c->body += u; c->bodyleft -= u;
    }
    if (c->last) { c->last = 0; shutdown(c->fd, SHUT_WR); }
    return 1;
}
static void h2hdr(unsigned char *p, size_t len, int type, int flags, uint32_t sid) {
    p[0] = len >> 16; p[1] = len >> 8; p[2] = len; p[3] = type; p[4] = flags;
    p[5] = sid >> 24; p[6] = sid >> 16; p[7] = sid >> 8; p[8] = sid;
}
static void o_h2resp(oc *c, uint32_t sid) {
    static unsigned char b[2048]; size_t n = 0;
    static const char ct[] = "application/grpc";
    size_t hl = 1 + 2 + 1 + 16;
    h2hdr(b, hl, 1, 4, sid); n = 9;
    b[n++] = 0x88; b[n++] = 0x0f; b[n++] = 0x10; b[n++] = 16; memcpy(b + n, ct, 16); n += 16;
    h2hdr(b + n, H2BODY, 0, 0, sid); n += 9; memcpy(b + n, h2msg, H2BODY); n += H2BODY;
    h2hdr(b + n, 15, 1, 5, sid); n += 9;
    b[n++] = 0; b[n++] = 11; memcpy(b + n, "grpc-status", 11); n += 11; b[n++] = 1; b[n++] = '0';
    o_put(c, b, n);
    c->cwnd -= H2BODY;
    st_requests++;
}
/* ---------- calls that stay open ---------- */
#define MESSAGE 64 /* prefix 5, 'S', kind, rate, nanoseconds 8, pattern 48 */
#define CALLS 65536
static void message(unsigned char *m, char kind, int rate) {
    uint64_t t = now();
    m[0] = m[1] = m[2] = m[3] = 0; m[4] = MESSAGE - 5;
    m[5] = 'S'; m[6] = (unsigned char)kind; m[7] = (unsigned char)rate;
    memcpy(m + 8, &t, 8); memcpy(m + 16, pat, MESSAGE - 16);
}
static void o_data(oc *c, uint32_t sid, const unsigned char *p, size_t n) {
    unsigned char h[9];
    h2hdr(h, n, 0, 0, sid); o_put(c, h, 9); o_put(c, p, n);
    c->cwnd -= (int64_t)n;
}
/* what came on a stream before its end: the first message says what the call wants */
static void o_call(oc *c, uint32_t sid, const unsigned char *p, size_t n) {
    unsigned char *is = c->open ? c->open + (sid >> 1) % CALLS : NULL;
    if (!(is && *is)) {
        if (n < MESSAGE || p[5] != 'S') return;
        if (!c->open) c->open = calloc(CALLS, 1);
        is = c->open + (sid >> 1) % CALLS; *is = p[6];
        unsigned char b[64]; size_t k = 9;
        b[k++] = 0x88; b[k++] = 0x0f; b[k++] = 0x10; b[k++] = 16; memcpy(b + k, "application/grpc", 16); k += 16;
        h2hdr(b, k - 9, 1, 4, sid); o_put(c, b, k);
        st_requests++;
        if (*is == 'P') {
            if (!c->pushcap) { c->next_push = pushers; if (pushers) pushers->prev_push = c; pushers = c; }
            if (c->npush == c->pushcap) { c->pushcap = c->pushcap * 2 + 64; c->push = realloc(c->push, c->pushcap * 4); }
            c->push[c->npush++] = sid; c->rate = p[7];
        }
    }
    if (*is == 'E' && c->cwnd >= (int64_t)n) o_data(c, sid, p, n);
}
static void o_call_end(oc *c, uint32_t sid) {
    for (size_t i = 0; i < c->npush; i++) if (c->push[i] == sid) { c->push[i] = c->push[--c->npush]; break; }
    if (c->open) c->open[(sid >> 1) % CALLS] = 0;
}
#define TICK_MS 5
static int o_flush(oc *c);
static uint64_t ticks;
/* every stream's share of messages; a flush that would block goes on when the socket is writable */
static void o_tick(int e) {
    ticks++;
    for (oc *c = pushers, *next; c; c = next) {
        next = c->next_push;
        uint64_t every = 1000 / TICK_MS / (uint64_t)(c->rate ? c->rate : 1); /* ticks between two messages of a stream */
        unsigned char m[MESSAGE];
        for (size_t i = 0; i < c->npush; i++) {
            if (c->push[i] / 2 % every != ticks % every || c->cwnd < MESSAGE) continue;
            message(m, 'P', 0); o_data(c, c->push[i], m, MESSAGE);
        }
        int r = o_flush(c);
        if (r == 0 && !c->want_out) { c->want_out = 1; ep(e, EPOLL_CTL_MOD, c->fd, EPOLLIN | EPOLLOUT, c); }
    }
}
static int o_h2(oc *c) {
    size_t off = 0;
    unsigned char t[64];
    while (c->inlen - off >= 9) {
        unsigned char *p = (unsigned char *)c->in + off;
        size_t len = p[0] << 16 | p[1] << 8 | p[2];
        if (c->inlen - off < 9 + len) break;
        int type = p[3], fl = p[4];
        uint32_t sid = (p[5] & 127u) << 24 | p[6] << 16 | p[7] << 8 | p[8];
        if (type == 4 && !(fl & 1)) { h2hdr(t, 0, 4, 1, 0); o_put(c, t, 9); }
        else if (type == 6 && !(fl & 1)) { h2hdr(t, 8, 6, 1, 0); memcpy(t + 9, p + 9, 8); o_put(c, t, 17); }
        else if (type == 8 && sid == 0) c->cwnd += (p[9] & 127u) << 24 | p[10] << 16 | p[11] << 8 | p[12];
        else if (type == 0) {
            c->rx += len;
            if (len && !(fl & 1)) o_call(c, sid, p + 9, len);
            if (c->rx > 1 << 18) { h2hdr(t, 4, 8, 0, 0); t[9] = c->rx >> 24; t[10] = c->rx >> 16; t[11] = c->rx >> 8; t[12] = c->rx; o_put(c, t, 13); c->rx = 0; }
        }
        if (type == 3 || ((type == 0 || type == 1) && (fl & 1) && c->open && c->open[(sid >> 1) % CALLS])) {
            o_call_end(c, sid);
        } else if ((type == 0 || type == 1) && (fl & 1)) {
            if (c->cwnd >= H2BODY && c->qh == c->qt) o_h2resp(c, sid);
            else {
                if (c->qt == c->qcap) { c->qcap = c->qcap * 2 + 256; c->q = realloc(c->q, c->qcap * 4); }
                c->q[c->qt++] = sid;
            }
        }
        off += 9 + len;
    }
    while (c->qh < c->qt && c->cwnd >= H2BODY) o_h2resp(c, c->q[c->qh++]);
    if (c->qh == c->qt) c->qh = c->qt = 0;
    if (off) { memmove(c->in, c->in + off, c->inlen - off); c->inlen -= off; }
    return o_flush(c);
}
/* what came of a request's body: checked, counted, thrown away; then the answer */
static int o_upload(oc *c, size_t off) {
    size_t n = c->inlen - off < c->upload ? c->inlen - off : c->upload;
    for (size_t i = 0; i < n;) {
        size_t at = c->got & (CHUNK - 1), k = n - i < CHUNK ? n - i : CHUNK;
        if (memcmp(c->in + off + i, pat + at, k)) { st_bad++; break; }
        i += k; c->got += k;
    }
    c->upload -= n; st_bulk += n;
    if (!c->upload) o_put(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 38);
    return (int)n;
}
static int o_http(oc *c) {
    size_t off = 0; int r = 1;
    while (off < c->inlen && !c->bodyleft && !c->more) {
        if (c->upload) { off += (size_t)o_upload(c, off); r = o_flush(c); if (r <= 0) break; continue; }
        char *s = c->in + off, *end = memmem(s, c->inlen - off, "\r\n\r\n", 4);
        if (!end) break;
        st_requests++;
        if (!memcmp(s, "PUT ", 4)) {
            *end = 0;
            char *cl = strcasestr(s, "\r\ncontent-length:");
            c->upload = cl ? strtoull(cl + 17, NULL, 10) : 0; c->got = 0;
            if (!c->upload) { st_bad++; return -1; }
            off = (size_t)(end + 4 - c->in);
            continue;
        }
        char h[160]; int hl; size_t size = 0;
        char *path = memchr(s, ' ', 16), *version = memmem(s, (size_t)(end - s), " HTTP/1.0", 9);
        c->last = version != NULL;
        if (path && !strncmp(path, " /stats", 7)) {
            char b[256];
            int bl = snprintf(b, sizeof b, "{\"accepted\":%llu,\"requests\":%llu,\"bulk\":%llu,\"open\":%llu,\"bad\":%llu}",
                              (unsigned long long)st_accepted, (unsigned long long)st_requests, (unsigned long long)st_bulk,
                              (unsigned long long)st_open, (unsigned long long)st_bad);
            hl = snprintf(h, sizeof h, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", bl);
            o_put(c, h, hl); o_put(c, b, bl);
        } else {
            if (path) size = strtoul(path + 2, NULL, 10);
            hl = snprintf(h, sizeof h, "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %zu\r\n\r\n", size);
            o_put(c, h, hl);
            c->more = size;
        }
        off = (size_t)(end + 4 - c->in);
        r = o_flush(c);
        if (r <= 0) break;
    }
    if (off) { memmove(c->in, c->in + off, c->inlen - off); c->inlen -= off; }
    return r;
}
static char srcbuf[CHUNK], sinkbuf[CHUNK + BLK];
static int o_src(oc *c) { /* endless numbered blocks */
    for (int i = 0; i < 8; i++) {
        if (c->bodyleft == 0) {
            if (c->outoff == c->outlen) {
                c->outoff = c->outlen = 0;
                o_put(c, srcbuf, CHUNK);
                for (int k = 0; k < CHUNK / BLK; k++) { uint64_t v = c->blk++; memcpy(c->out + k * BLK, &v, 8); }
            }
        }
        int r = o_flush(c);
        if (r <= 0) return r;
        st_bulk += CHUNK;
    }
    return 2; /* more to do */
}
static int blocks_ok(char *b, size_t n, uint64_t *blk) { /* n multiple of BLK */
    for (size_t i = 0; i < n; i += BLK) { uint64_t v; memcpy(&v, b + i, 8); if (v != (*blk)++ || b[i + BLK - 1] != srcbuf[BLK - 1]) return 0; }
    return 1;
}
static int o_sink(oc *c) { /* c->in holds the partial block */
    for (int i = 0; i < 8; i++) {
        memcpy(sinkbuf, c->in, c->inlen);
        ssize_t n = recv(c->fd, sinkbuf + c->inlen, CHUNK, 0);
        if (n < 0) return errno == EAGAIN ? 1 : -1;
        if (n == 0) return -1;
        size_t have = c->inlen + (size_t)n, full = have / BLK * BLK;
        if (!blocks_ok(sinkbuf, full, &c->blk)) { st_bad++; return -1; }
        memcpy(c->in, sinkbuf + full, have - full); c->inlen = have - full;
        c->got += full; st_bulk += full;
        if (c->got - c->acked >= 1 << 20) { c->acked = c->got; o_put(c, &c->acked, 8); int r = o_flush(c); if (r < 0) return -1; }
    }
    return 1;
}
static void origin(int port) {
    int e = epoll_create1(0), l = listen_on(port);
    ep(e, EPOLL_CTL_ADD, l, EPOLLIN, NULL);
    struct epoll_event ev[256];
    uint64_t tick_at = now();
    printf("{\"ready\":1}\n"); fflush(stdout);
    for (;;) {
        int n = epoll_wait(e, ev, 256, pushers ? 1 : -1);
        if (pushers && now() >= tick_at) { o_tick(e); tick_at = now() + TICK_MS * 1000000ull; }
        for (int i = 0; i < n; i++) {
            oc *c = ev[i].data.ptr;
            if (!c) {
                for (int k = 0; k < 64; k++) {
                    int fd = accept4(l, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                    if (fd < 0) break;
                    nodelay(fd);
                    c = calloc(1, sizeof *c);
                    c->fd = fd; c->incap = 1024; c->in = malloc(c->incap); c->cwnd = 65535;
                    st_accepted++; st_open++;
                    ep(e, EPOLL_CTL_ADD, fd, EPOLLIN, c);
                }
                continue;
            }
            int r = 1, dead = 0;
            if (c->kind == K_SINK) { r = o_sink(c); }
            else if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                for (;;) {
                    if (c->incap - c->inlen < 512) { c->incap *= 2; c->in = realloc(c->in, c->incap); }
                    size_t room = c->incap - c->inlen;
                    ssize_t k = recv(c->fd, c->in + c->inlen, room, 0);
                    if (k == 0 || (k < 0 && errno != EAGAIN)) { dead = 1; break; }
                    if (k < 0) break;
                    c->inlen += (size_t)k;
                    if ((size_t)k < room || c->incap >= 1 << 20) break;
                }
                if (!dead && c->kind == K_NEW && c->inlen >= 4) {
                    if (!memcmp(c->in, "PRI ", 4)) {
                        if (c->inlen >= 24) {
                            static const unsigned char set[] = {0,0,12,4,0,0,0,0,0, 0,3,0,0,4,0, 0,4,0,16,0,0, 0,0,4,8,0,0,0,0,0, 0,16,0,0};
                            c->kind = K_H2; memmove(c->in, c->in + 24, c->inlen - 24); c->inlen -= 24;
                            o_put(c, set, sizeof set);
                        }
                    } else if (!memcmp(c->in, "BLKD", 4)) { c->kind = K_SRC; }
                    else if (!memcmp(c->in, "BLKU", 4)) {
                        c->kind = K_SINK;
                        if (c->incap < BLK * 2) { c->incap = BLK * 2; c->in = realloc(c->in, c->incap); }
                        /* whatever followed the tag, in whole and part blocks */
                        size_t rest = c->inlen - 4, full = rest / BLK * BLK;
                        memmove(c->in, c->in + 4, rest);
                        if (!blocks_ok(c->in, full, &c->blk)) { st_bad++; dead = 1; }
                        c->got += full;
                        memmove(c->in, c->in + full, rest - full); c->inlen = rest - full;
                    } else c->kind = K_HTTP;
                }
            }
            if (!dead) {
                if (c->kind == K_H2) r = o_h2(c);
                else if (c->kind == K_HTTP) { r = o_flush(c); if (r == 1) r = o_http(c); }
                else if (c->kind == K_SRC) r = o_src(c);
            }
            if (dead || r < 0) { o_free(e, c); continue; }
            int wo = c->kind == K_SRC || r == 0;
            if (wo != c->want_out) { c->want_out = wo; ep(e, EPOLL_CTL_MOD, c->fd, EPOLLIN | (wo ? EPOLLOUT : 0), c); }
        }
    }
}

/* ================= HTTP/1.1 client ================= */
typedef struct {
    int fd, busy, connected;
    uint64_t t0;
    char buf[16384]; size_t len;
    size_t bodyleft, bodyoff; int inbody;
} hc;
static size_t want_size;
static char req[256]; static size_t reqlen;
static int h_send(hc *c, uint64_t t) {
    c->t0 = t; c->busy = 1; c->len = 0; c->inbody = 0;
    ssize_t n = send(c->fd, req, reqlen, MSG_NOSIGNAL);
    if (n != (ssize_t)reqlen) { fault("short send"); return -1; }
    return 0;
}
/* 1 complete, 0 more, -1 fault */
static int h_recv(hc *c) {
    for (;;) {
        size_t cap = sizeof c->buf - c->len;
        static char big[256 * 1024];
        char *dst = c->inbody ? big : c->buf + c->len;
        size_t room = c->inbody ? sizeof big : cap;
        ssize_t n = recv(c->fd, dst, room, 0);
        if (n < 0) { if (errno == EAGAIN) return 0; fault("connection reset"); return -1; }
        if (n == 0) { fault("connection closed before the whole response"); return -1; }
        size_t k = (size_t)n;
        char *b = dst;
        if (!c->inbody) {
            c->len += k;
            char *end = memmem(c->buf, c->len, "\r\n\r\n", 4);
            if (!end) { if (c->len == sizeof c->buf) { fault("header too long"); return -1; } continue; }
            if (memcmp(c->buf, "HTTP/1.1 200", 12)) { fault("status is not 200"); return -1; }
            *end = 0;
            char *cl = strcasestr(c->buf, "\r\ncontent-length:");
            if (!cl || strtoul(cl + 17, NULL, 10) != want_size) { fault("wrong content-length"); return -1; }
            c->inbody = 1; c->bodyleft = want_size; c->bodyoff = 0;
            b = end + 4; k = c->len - (size_t)(b - c->buf);
        }
        if (k > c->bodyleft) { fault("surplus bytes"); return -1; }
        if (k && memcmp(b, pat + (c->bodyoff & (CHUNK - 1)), k)) { fault("wrong body"); return -1; }
        c->bodyoff += k; c->bodyleft -= k;
        if (!c->bodyleft) { c->busy = 0; return 1; }
    }
}
static void mkreq(size_t size) {
    want_size = size;
    reqlen = (size_t)snprintf(req, sizeof req, "GET /%zu HTTP/1.1\r\nHost: app\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n", size);
}
static hc *h_open(int port, int conns, int e) { /* connect all, one checked request each */
    hc *cs = calloc((size_t)conns, sizeof *cs);
    for (int i = 0; i < conns; i++) {
        hc *c = cs + i;
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (fd < 0 || connect(fd, (void *)&a, sizeof a) < 0) { fault("connect"); break; }
        struct timeval tv = {10, 0};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
        nodelay(fd); c->fd = fd;
        if (h_send(c, now()) < 0 || h_recv(c) != 1) { if (!errors) fault("no response while opening"); break; }
        nb(fd);
        if (e >= 0) ep(e, EPOLL_CTL_ADD, fd, EPOLLIN, c);
    }
    return cs;
}
static void fail_open(void) {
    printf("{\"ready\":0,\"errors\":%llu,\"why\":\"%s\"}\n", (unsigned long long)errors, first_err);
    exit(1);
}
static void run_http(int port, int conns, double secs, size_t size, double rate) {
    int e = epoll_create1(0);
    mkreq(size);
    hc *cs = h_open(port, conns, e);
    if (errors) fail_open();
    ready_go();
    uint64_t start = now(), warm = start + (uint64_t)(secs * 0.1e9), stop = start + (uint64_t)(secs * 1e9);
    uint64_t total = 0, done = 0, behind = 0, sched = 0, sent = 0, meas0 = 0;
    int tfd = -1, warming = 1;
    int *idle = malloc(sizeof(int) * (size_t)conns), nidle = 0;
    double gap = rate > 0 ? 1e9 / rate : 0;
    if (rate > 0) {
        tfd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
        struct itimerspec it = {.it_interval = {0, (long)gap}, .it_value = {0, (long)gap}};
        timerfd_settime(tfd, 0, &it, NULL);
        ep(e, EPOLL_CTL_ADD, tfd, EPOLLIN, NULL);
        for (int i = 0; i < conns; i++) idle[nidle++] = i;
    } else for (int i = 0; i < conns; i++) { sent++; if (h_send(cs + i, now()) < 0) break; }
    struct epoll_event ev[256];
    uint64_t t = start;
    while (!errors && (t = now()) < stop) {
        int n = epoll_wait(e, ev, 256, 100);
        t = now();
        if (warming && t >= warm) { warming = 0; hreset(); done = 0; meas0 = t; }
        for (int i = 0; i < n && !errors; i++) {
            hc *c = ev[i].data.ptr;
            if (!c) { uint64_t x; if (read(tfd, &x, 8) == 8) {} continue; }
            int r = h_recv(c);
            if (r == 1) {
                uint64_t d = now();
                hadd(d - c->t0); total++; done++;
                if (rate > 0) idle[nidle++] = (int)(c - cs); else { sent++; h_send(c, d); }
            }
        }
        if (rate > 0) {
            t = now();
            while (nidle && !errors) {
                uint64_t due = start + (uint64_t)((double)sched * gap);
                if (due > t) break;
                sched++; sent++;
                h_send(cs + idle[--nidle], due);
            }
            if (!nidle) behind++;
        }
    }
    double el = (double)(t - meas0) / 1e9;
    printf("{\"errors\":%llu,\"why\":\"%s\",\"total\":%llu,\"measured\":%llu,\"secs\":%.4f,\"rps\":%.1f,\"behind\":%llu,",
           (unsigned long long)errors, first_err, (unsigned long long)total, (unsigned long long)done, el, (double)done / el, (unsigned long long)behind);
    put_cpu(); hprint(); printf("}\n");
}

/* ================= uploads over HTTP/1.1 ================= */
static void run_put(int port, int conns, double secs, size_t size) {
    int e = epoll_create1(0);
    mkreq(64);
    hc *cs = h_open(port, conns, e);
    if (errors) fail_open();
    ready_go();
    want_size = 0;
    reqlen = (size_t)snprintf(req, sizeof req, "PUT /upload HTTP/1.1\r\nHost: app\r\nContent-Length: %zu\r\n\r\n", size);
    uint64_t start = now(), warm = start + (uint64_t)(secs * 0.1e9), stop = start + (uint64_t)(secs * 1e9), t = start;
    uint64_t total = 0, sent = 0, sent0 = 0, m0 = start, *left = calloc((size_t)conns, sizeof *left), *off = calloc((size_t)conns, sizeof *off);
    for (int i = 0; i < conns; i++) { if (h_send(cs + i, now()) < 0) break; left[i] = size; ep(e, EPOLL_CTL_MOD, cs[i].fd, EPOLLIN | EPOLLOUT, cs + i); }
    struct epoll_event ev[64]; int warming = 1, busy = conns;
    while (!errors && busy && (t = now()) < stop + 30000000000ull) { /* what has begun is ended: it is checked by its answer */
        int n = epoll_wait(e, ev, 64, 100);
        if (warming && now() >= warm) { warming = 0; m0 = now(); sent0 = sent; }
        for (int k = 0; k < n && !errors; k++) {
            hc *c = ev[k].data.ptr; size_t i = (size_t)(c - cs);
            if (ev[k].events & EPOLLOUT) for (int r = 0; r < 4 && left[i]; r++) {
                size_t at = off[i] & (CHUNK - 1), want = left[i] < CHUNK ? left[i] : CHUNK;
                ssize_t g = send(c->fd, pat + at, want, MSG_NOSIGNAL);
                if (g < 0) { if (errno != EAGAIN) fault("send"); break; }
                left[i] -= (uint64_t)g; off[i] += (uint64_t)g; sent += (uint64_t)g;
                if (!left[i]) ep(e, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
            }
            if (!(ev[k].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || h_recv(c) != 1) continue;
            if (left[i]) { fault("answered before the whole body was sent"); break; }
            hadd(now() - c->t0); total++;
            if (now() >= stop) { busy--; continue; }
            off[i] = 0; left[i] = size;
            if (h_send(c, now()) == 0) ep(e, EPOLL_CTL_MOD, c->fd, EPOLLIN | EPOLLOUT, c);
        }
    }
    if (!errors && busy) fault("an upload was not answered");
    double el = (double)(now() - m0) / 1e9;
    printf("{\"errors\":%llu,\"why\":\"%s\",\"total\":%llu,\"secs\":%.4f,\"gbps\":%.4f,\"bytes_total\":%llu,",
           (unsigned long long)errors, first_err, (unsigned long long)total, el, (double)(sent - sent0) / el / 1e9, (unsigned long long)sent);
    put_cpu(); hprint(); printf("}\n");
}

/* ================= churn ================= */
static void run_churn(int port, int conns, double secs, size_t size) {
    int e = epoll_create1(0);
    mkreq(size);
    hc *one = h_open(port, 1, -1);
    if (errors) fail_open();
    close(one->fd);
    ready_go();
    hc *cs = calloc((size_t)conns, sizeof *cs);
    uint64_t start = now(), warm = start + (uint64_t)(secs * 0.1e9), stop = start + (uint64_t)(secs * 1e9), t = start;
    uint64_t total = 0, done = 0, meas0 = 0; int warming = 1;
    for (int i = 0; i < conns; i++) { cs[i].t0 = now(); cs[i].fd = dial_start(port); if (cs[i].fd < 0) { fault("connect"); break; } ep(e, EPOLL_CTL_ADD, cs[i].fd, EPOLLOUT, cs + i); }
    struct epoll_event ev[256];
    while (!errors && (t = now()) < stop) {
        int n = epoll_wait(e, ev, 256, 100);
        if (warming && now() >= warm) { warming = 0; hreset(); done = 0; meas0 = now(); }
        for (int i = 0; i < n && !errors; i++) {
            hc *c = ev[i].data.ptr;
            if (!c->connected) {
                int so = 0; socklen_t sl = sizeof so;
                getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &so, &sl);
                if (so) { fault("connect refused"); break; }
                c->connected = 1;
                ep(e, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
                uint64_t t0 = c->t0;
                h_send(c, t0);
                continue;
            }
            if (h_recv(c) == 1) {
                uint64_t d = now();
                hadd(d - c->t0); total++; done++;
                close(c->fd);
                c->connected = 0; c->t0 = d; c->fd = dial_start(port);
                if (c->fd < 0) { fault("connect"); break; }
                ep(e, EPOLL_CTL_ADD, c->fd, EPOLLOUT, c);
            }
        }
    }
    double el = (double)(t - meas0) / 1e9;
    printf("{\"errors\":%llu,\"why\":\"%s\",\"total\":%llu,\"measured\":%llu,\"secs\":%.4f,\"rps\":%.1f,",
           (unsigned long long)errors, first_err, (unsigned long long)total, (unsigned long long)done, el, (double)done / el);
    put_cpu(); hprint(); printf("}\n");
}

/* ================= idle ================= */
static void run_idle(int port, int conns) {
    mkreq(16);
    uint64_t t0 = now();
    hc *cs = h_open(port, conns, -1);
    if (errors) fail_open();
    double open_s = (double)(now() - t0) / 1e9;
    ready_go();
    for (int i = 0; i < conns; i++) {
        hc *c = cs + i;
        fcntl(c->fd, F_SETFL, fcntl(c->fd, F_GETFL) & ~O_NONBLOCK);
        if (h_send(c, now()) < 0 || h_recv(c) != 1) { if (!errors) fault("an idle connection died"); break; }
    }
    printf("{\"errors\":%llu,\"why\":\"%s\",\"conns\":%d,\"open_s\":%.3f}\n", (unsigned long long)errors, first_err, conns, open_s);
}

/* connected, or the load is over */
static int dial_now(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || connect(fd, (void *)&a, sizeof a) < 0) { fault("connect"); fail_open(); }
    nodelay(fd); nb(fd);
    return fd;
}

/* ================= bulk ================= */
typedef struct { int fd, up; size_t inlen; char in[BLK]; uint64_t blk, got, acked; char *out; size_t off, len; unsigned char ack[8]; int ackn; } bc;
static void run_bulk(int port, int streams, double secs, char dir) {
    int e = epoll_create1(0), n = dir == 'B' ? streams * 2 : streams;
    bc *cs = calloc((size_t)n, sizeof *cs);
    for (int i = 0; i < n; i++) {
        bc *c = cs + i;
        c->fd = dial_now(port);
        c->up = dir == 'U' || (dir == 'B' && i >= streams);
        if (c->up) { c->out = malloc(CHUNK); memcpy(c->out, srcbuf, CHUNK); }
    }
    ready_go();
    for (int i = 0; i < n; i++) {
        bc *c = cs + i;
        if (send(c->fd, c->up ? "BLKU" : "BLKD", 4, MSG_NOSIGNAL) != 4) fault("tag");
        ep(e, EPOLL_CTL_ADD, c->fd, EPOLLIN | (c->up ? EPOLLOUT : 0), c);
    }
    uint64_t start = now(), warm = start + (uint64_t)(secs * 0.15e9), stop = start + (uint64_t)(secs * 1e9), t = start, m0 = 0;
    uint64_t down = 0, up = 0, down0 = 0, up0 = 0; int warming = 1;
    struct epoll_event ev[64];
    while (!errors && (t = now()) < stop) {
        int k = epoll_wait(e, ev, 64, 100);
        if (warming && now() >= warm) { warming = 0; m0 = now(); down0 = down; up0 = up; }
        for (int i = 0; i < k && !errors; i++) {
            bc *c = ev[i].data.ptr;
            if (!c->up) {
                for (int r = 0; r < 4; r++) {
                    memcpy(sinkbuf, c->in, c->inlen);
                    ssize_t g = recv(c->fd, sinkbuf + c->inlen, CHUNK, 0);
                    if (g < 0) { if (errno != EAGAIN) fault("reset"); break; }
                    if (g == 0) { fault("stream closed early"); break; }
                    size_t have = c->inlen + (size_t)g, full = have / BLK * BLK;
                    if (!blocks_ok(sinkbuf, full, &c->blk)) { fault("wrong bulk data"); break; }
                    memcpy(c->in, sinkbuf + full, have - full); c->inlen = have - full;
                    down += (uint64_t)g;
                    if (g < 65536) break;
                }
                continue;
            }
            if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                for (;;) {
                    ssize_t g = recv(c->fd, c->ack + c->ackn, 8 - (size_t)c->ackn, 0);
                    if (g < 0) { if (errno != EAGAIN) fault("reset"); break; }
                    if (g == 0) { fault("sink closed: bad data or cut"); break; }
                    c->ackn += (int)g;
                    if (c->ackn == 8) { uint64_t a; memcpy(&a, c->ack, 8); c->ackn = 0; if (a < c->acked) fault("acks went back"); up += a - c->acked; c->acked = a; }
                }
            }
            if (ev[i].events & EPOLLOUT) {
                for (int r = 0; r < 4; r++) {
                    if (c->off == c->len) { for (int b = 0; b < CHUNK / BLK; b++) { uint64_t v = c->blk++; memcpy(c->out + b * BLK, &v, 8); } c->off = 0; c->len = CHUNK; }
                    ssize_t g = send(c->fd, c->out + c->off, c->len - c->off, MSG_NOSIGNAL);
                    if (g < 0) { if (errno != EAGAIN) fault("send"); break; }
                    c->off += (size_t)g;
                }
            }
        }
    }
    double el = (double)(t - m0) / 1e9;
    if (!errors && down - down0 + up - up0 == 0) fault("nothing arrived");
    printf("{");
    put_cpu();
    printf("\"errors\":%llu,\"why\":\"%s\",\"secs\":%.4f,\"bytes_total\":%llu,\"gbps\":%.4f,\"down_gbps\":%.4f,\"up_gbps\":%.4f}\n",
           (unsigned long long)errors, first_err, el, (unsigned long long)(down + up), (double)(down - down0 + up - up0) / el / 1e9,
           (double)(down - down0) / el / 1e9, (double)(up - up0) / el / 1e9);
}

/* ================= HTTP/2 client, gRPC shaped ================= */
#define RING 65536
typedef struct { uint64_t t0; uint32_t got; int ok; } h2s;
typedef struct { int fd, want_out, inflight; uint32_t next; char *in; size_t inlen, incap; char *out; size_t off, len, cap; uint64_t rx; h2s *ring; } h2c;
static void c_put(h2c *c, const void *p, size_t n) {
    if (c->off == c->len) c->off = c->len = 0;
    if (c->len + n > c->cap) { c->cap = (c->len + n) * 2; c->out = realloc(c->out, c->cap); }
    memcpy(c->out + c->len, p, n); c->len += n;
}
static int c_flush(h2c *c) {
    while (c->off < c->len) {
        ssize_t n = send(c->fd, c->out + c->off, c->len - c->off, MSG_NOSIGNAL);
        if (n < 0) { if (errno == EAGAIN) return 0; fault("h2 send"); return -1; }
        c->off += (size_t)n;
    }
    return 1;
}
static unsigned char h2req[512]; static size_t h2reqlen, h2hl;
static void mkh2(void) {
    size_t n = 9;
    static const char path[] = "/bench.Echo/Unary";
    h2req[n++] = 0x83; h2req[n++] = 0x86;
    h2req[n++] = 0x04; h2req[n++] = sizeof path - 1; memcpy(h2req + n, path, sizeof path - 1); n += sizeof path - 1;
    h2req[n++] = 0x01; h2req[n++] = 3; memcpy(h2req + n, "app", 3); n += 3;
    h2req[n++] = 0x0f; h2req[n++] = 0x10; h2req[n++] = 16; memcpy(h2req + n, "application/grpc", 16); n += 16;
    h2req[n++] = 0x00; h2req[n++] = 2; memcpy(h2req + n, "te", 2); n += 2; h2req[n++] = 8; memcpy(h2req + n, "trailers", 8); n += 8;
    h2hl = n - 9;
    h2hdr(h2req, h2hl, 1, 4, 0);
    h2hdr(h2req + n, 69, 0, 1, 0); n += 9;
    h2req[n++] = 0; h2req[n++] = 0; h2req[n++] = 0; h2req[n++] = 0; h2req[n++] = 64; memcpy(h2req + n, pat, 64); n += 64;
    h2reqlen = n;
}
static void h2_issue(h2c *c) {
    uint32_t sid = c->next; c->next += 2;
    h2s *s = &c->ring[(sid >> 1) % RING];
    s->t0 = now(); s->got = 0; s->ok = 0;
    for (int k = 0; k < 2; k++) { unsigned char *p = h2req + (k ? 9 + h2hl : 0); p[5] = sid >> 24; p[6] = sid >> 16; p[7] = sid >> 8; p[8] = sid; }
    c_put(c, h2req, h2reqlen);
    c->inflight++;
}
static int h2_status200(const unsigned char *p, size_t n) {
    size_t i = 0;
    while (i < n && (p[i] & 0xe0) == 0x20) { int more = (p[i] & 31) == 31; i++; while (more && i < n) more = p[i++] & 128; }
    return i < n && p[i] == 0x88;
}
/* a connection with its preface and settings begun, and room for the state of so many streams */
static void h2_dial(h2c *c, int port, size_t ring) {
    static const unsigned char set[] = {0,0,12,4,0,0,0,0,0, 0,2,0,0,0,0, 0,4,0,16,0,0, 0,0,4,8,0,0,0,0,0, 0,255,0,0};
    c->fd = dial_now(port);
    c->next = 1; c->incap = 1 << 17; c->in = malloc(c->incap); c->ring = calloc(ring, sizeof(h2s));
    c_put(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24); c_put(c, set, sizeof set);
}
static void run_h2(int port, int conns, int streams, double secs) {
    int e = epoll_create1(0);
    h2c *cs = calloc((size_t)conns, sizeof *cs);
    mkh2();
    uint64_t total = 0, done = 0, m0 = 0, start = 0, warm = 0, stop = 0;
    int phase = 0, warming = 1; /* phase 0: one call per connection */
    for (int i = 0; i < conns; i++) {
        h2c *c = cs + i;
        h2_dial(c, port, RING);
        h2_issue(c); c_flush(c);
        ep(e, EPOLL_CTL_ADD, c->fd, EPOLLIN, c);
    }
    struct epoll_event ev[64];
    uint64_t t, giveup = now() + 10000000000ull;
    for (;;) {
        t = now();
        if (errors) break;
        if (phase == 0 && total == (uint64_t)conns) {
            ready_go();
            phase = 1; total = done = 0; start = now(); warm = start + (uint64_t)(secs * 0.1e9); stop = start + (uint64_t)(secs * 1e9);
            for (int i = 0; i < conns; i++) { for (int k = 0; k < streams; k++) h2_issue(cs + i); c_flush(cs + i); }
            continue;
        }
        if (phase == 0 && t > giveup) { fault("no HTTP/2 response"); break; }
        if (phase && t >= stop) break;
        int n = epoll_wait(e, ev, 64, 100);
        if (phase && warming && now() >= warm) { warming = 0; hreset(); done = 0; m0 = now(); }
        for (int i = 0; i < n && !errors; i++) {
            h2c *c = ev[i].data.ptr;
            if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                ssize_t g = recv(c->fd, c->in + c->inlen, c->incap - c->inlen, 0);
                if (g == 0 || (g < 0 && errno != EAGAIN)) { fault("h2 connection lost"); break; }
                if (g > 0) c->inlen += (size_t)g;
                size_t off = 0; unsigned char x[32];
                while (c->inlen - off >= 9) {
                    unsigned char *p = (unsigned char *)c->in + off;
                    size_t len = p[0] << 16 | p[1] << 8 | p[2];
                    if (c->inlen - off < 9 + len) break;
                    int type = p[3], fl = p[4];
                    uint32_t sid = (p[5] & 127u) << 24 | p[6] << 16 | p[7] << 8 | p[8];
                    h2s *s = &c->ring[(sid >> 1) % RING];
                    if (type == 4 && !(fl & 1)) { h2hdr(x, 0, 4, 1, 0); c_put(c, x, 9); }
                    else if (type == 6 && !(fl & 1)) { h2hdr(x, 8, 6, 1, 0); memcpy(x + 9, p + 9, 8); c_put(c, x, 17); }
                    else if (type == 7 || type == 3) fault("h2 GOAWAY or RST_STREAM");
                    else if (type == 0) {
                        if (s->got + len > H2BODY || memcmp(p + 9, h2msg + s->got, len)) { fault("h2 wrong body"); break; }
                        s->got += (uint32_t)len; c->rx += len;
                        if (c->rx > 1 << 20) { h2hdr(x, 4, 8, 0, 0); x[9] = c->rx >> 24; x[10] = c->rx >> 16; x[11] = c->rx >> 8; x[12] = c->rx; c_put(c, x, 13); c->rx = 0; }
                        if (fl & 1) fault("h2 trailers missing");
                    } else if (type == 1) {
                        if (!s->ok) { if (!h2_status200(p + 9, len)) { fault("h2 status is not 200"); break; } s->ok = 1; if (fl & 1) fault("h2 trailers-only response"); }
                        else if (fl & 1) {
                            if (s->got != H2BODY) { fault("h2 short body"); break; }
                            hadd(now() - s->t0); total++; done++; c->inflight--;
                            if (phase) h2_issue(c);
                        }
                    }
                    off += 9 + len;
                }
                if (off) { memmove(c->in, c->in + off, c->inlen - off); c->inlen -= off; }
            }
            int r = c_flush(c);
            if (r < 0) break;
            if ((r == 0) != c->want_out) { c->want_out = r == 0; ep(e, EPOLL_CTL_MOD, c->fd, EPOLLIN | (r == 0 ? EPOLLOUT : 0), c); }
        }
    }
    if (phase == 0) fail_open();
    double el = (double)(t - m0) / 1e9;
    printf("{\"errors\":%llu,\"why\":\"%s\",\"total\":%llu,\"measured\":%llu,\"secs\":%.4f,\"rps\":%.1f,",
           (unsigned long long)errors, first_err, (unsigned long long)total, (unsigned long long)done, el, (double)done / el);
    put_cpu(); hprint(); printf("}\n");
}

/* ================= gRPC shaped calls that stay open ================= */
static void streams_send(h2c *c, uint32_t sid, char kind, int rate) {
    unsigned char b[9 + MESSAGE];
    h2hdr(b, MESSAGE, 0, 0, sid); message(b + 9, kind, rate);
    c_put(c, b, sizeof b);
}
/* the bytes of one stream are messages one after the other, however they are cut into frames */
static uint64_t streams_take(h2s *s, unsigned char (*part)[MESSAGE], const unsigned char *p, size_t n) {
    uint64_t whole = 0;
    while (n) {
        size_t k = MESSAGE - s->got < n ? MESSAGE - s->got : n;
        memcpy(*part + s->got, p, k); s->got += (uint32_t)k; p += k; n -= k;
        if (s->got < MESSAGE) break;
        uint64_t t; memcpy(&t, *part + 8, 8);
        if ((*part)[5] != 'S' || memcmp(*part + 16, pat, MESSAGE - 16)) { fault("wrong message"); break; }
        hadd(now() - t); whole++; s->got = 0;
    }
    return whole;
}
static void run_streams(int port, int conns, int streams, double secs, int rate, char kind) {
    int e = epoll_create1(0);
    h2c *cs = calloc((size_t)conns, sizeof *cs);
    unsigned char (*parts)[MESSAGE] = calloc((size_t)conns * (size_t)streams, MESSAGE);
    mkh2();
    for (int i = 0; i < conns; i++) {
        h2c *c = cs + i;
        h2_dial(c, port, (size_t)streams);
        for (int k = 0; k < streams; k++) {
            uint32_t sid = 1 + 2 * (uint32_t)k;
            h2req[5] = sid >> 24; h2req[6] = sid >> 16; h2req[7] = sid >> 8; h2req[8] = sid;
            c_put(c, h2req, 9 + h2hl); streams_send(c, sid, kind, rate);
        }
        c_flush(c);
        ep(e, EPOLL_CTL_ADD, c->fd, EPOLLIN, c);
    }
    struct epoll_event ev[64];
    int phase = 0, opened = 0, all = conns * streams;
    uint64_t total = 0, done = 0, m0 = 0, stop = 0, warm = 0, tick = 0, tick_at = 0, giveup = now() + 20000000000ull, every = 1000 / TICK_MS / (uint64_t)rate;
    for (;;) {
        uint64_t t = now();
        if (errors) break;
        if (!phase && opened == all && total >= (uint64_t)all) {
            ready_go();
            phase = 1; total = done = 0; t = tick_at = now(); warm = t + (uint64_t)(secs * 0.1e9); stop = t + (uint64_t)(secs * 1e9);
        }
        if (!phase && t > giveup) { fault("not all streams were answered"); break; }
        if (phase && t >= stop) break;
        if (warm && t >= warm) { warm = 0; hreset(); done = 0; m0 = t; }
        if (phase && kind == 'E' && t >= tick_at) {
            for (int i = 0; i < conns; i++) for (int k = 0; k < streams; k++)
                if ((uint64_t)k % every == tick % every) streams_send(cs + i, 1 + 2 * (uint32_t)k, kind, rate);
            tick++; tick_at = t + TICK_MS * 1000000ull;
            for (int i = 0; i < conns; i++) {
                int r = c_flush(cs + i);
                if (r == 0 && !cs[i].want_out) { cs[i].want_out = 1; ep(e, EPOLL_CTL_MOD, cs[i].fd, EPOLLIN | EPOLLOUT, cs + i); }
            }
        }
        int n = epoll_wait(e, ev, 64, phase && kind == 'E' ? 1 : 50);
        for (int i = 0; i < n && !errors; i++) {
            h2c *c = ev[i].data.ptr;
            if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                ssize_t g = recv(c->fd, c->in + c->inlen, c->incap - c->inlen, 0);
                if (g == 0 || (g < 0 && errno != EAGAIN)) { fault("h2 connection lost"); break; }
                if (g > 0) c->inlen += (size_t)g;
                size_t off = 0; unsigned char x[32];
                while (c->inlen - off >= 9 && !errors) {
                    unsigned char *p = (unsigned char *)c->in + off;
                    size_t len = p[0] << 16 | p[1] << 8 | p[2];
                    if (c->inlen - off < 9 + len) break;
                    int type = p[3], fl = p[4];
                    uint32_t sid = (p[5] & 127u) << 24 | p[6] << 16 | p[7] << 8 | p[8], k = sid >> 1;
                    if (type == 4 && !(fl & 1)) { h2hdr(x, 0, 4, 1, 0); c_put(c, x, 9); }
                    else if (type == 6 && !(fl & 1)) { h2hdr(x, 8, 6, 1, 0); memcpy(x + 9, p + 9, 8); c_put(c, x, 17); }
                    else if (type == 7 || type == 3) fault("h2 GOAWAY or RST_STREAM");
                    else if (type <= 1 && (fl & 1)) fault("a stream ended");
                    else if (type <= 1 && k >= (uint32_t)streams) fault("an unknown stream");
                    else if (type == 1) { if (!h2_status200(p + 9, len)) fault("h2 status is not 200"); else opened++; }
                    else if (type == 0) {
                        uint64_t whole = streams_take(&c->ring[k], parts + (size_t)(c - cs) * (size_t)streams + k, p + 9, len);
                        total += whole; done += whole; c->rx += len;
                        if (c->rx > 1 << 20) { h2hdr(x, 4, 8, 0, 0); x[9] = c->rx >> 24; x[10] = c->rx >> 16; x[11] = c->rx >> 8; x[12] = c->rx; c_put(c, x, 13); c->rx = 0; }
                    }
                    off += 9 + len;
                }
                if (off) { memmove(c->in, c->in + off, c->inlen - off); c->inlen -= off; }
            }
            int r = c_flush(c);
            if (r < 0) break;
            if ((r == 0) != c->want_out) { c->want_out = r == 0; ep(e, EPOLL_CTL_MOD, c->fd, EPOLLIN | (r == 0 ? EPOLLOUT : 0), c); }
        }
    }
    if (!phase) fail_open();
    double el = (double)(now() - m0) / 1e9;
    printf("{\"errors\":%llu,\"why\":\"%s\",\"total\":%llu,\"measured\":%llu,\"secs\":%.4f,\"rps\":%.1f,",
           (unsigned long long)errors, first_err, (unsigned long long)total, (unsigned long long)done, el, (double)done / el);
    put_cpu(); hprint(); printf("}\n");
}

/* ================= plain relay ================= */
typedef struct rs { int fd, eof, evs, wr_shut; struct rs *peer; char *b; size_t off, len; int pipe[2]; size_t inpipe; int dead, connecting; } rs;
#define RBUF 65536
static int use_splice;
static size_t held(rs *s) { return use_splice ? s->inpipe : s->len - s->off; }
/* move bytes s -> s->peer; -1 means close both */
static int move(rs *s) {
    rs *d = s->peer;
    ssize_t got = 0;
    for (int i = 0; i < 16; i++) {
        if (!held(s) && !s->eof) {
            ssize_t n;
            if (use_splice) n = splice(s->fd, NULL, s->pipe[1], NULL, 1 << 18, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            else n = recv(s->fd, s->b, RBUF, 0);
            if (n < 0) { if (errno == EAGAIN) break; return -1; }
            if (n == 0) s->eof = 1;
            else if (use_splice) s->inpipe = (size_t)n; else { s->off = 0; s->len = (size_t)n; }
            got = n;
        }
        if (held(s)) {
            ssize_t n = use_splice ? splice(s->pipe[0], NULL, d->fd, NULL, s->inpipe, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
                                   : send(d->fd, s->b + s->off, s->len - s->off, MSG_NOSIGNAL);
            if (n < 0) { if (errno == EAGAIN) break; return -1; }
            if (use_splice) s->inpipe -= (size_t)n; else s->off += (size_t)n;
        }
        if (!held(s) && !s->eof && got < (use_splice ? 1 << 16 : RBUF)) break; /* short read: wait for the next event */
        if (!held(s) && s->eof) { if (!d->wr_shut) { shutdown(d->fd, SHUT_WR); d->wr_shut = 1; } break; }
    }
    return 0;
}
static void rearm(int e, rs *s) {
    int ev = s->connecting ? EPOLLOUT : (!held(s) && !s->eof ? EPOLLIN : 0) | (held(s->peer) ? EPOLLOUT : 0);
    if (ev != s->evs) { s->evs = ev; ep(e, EPOLL_CTL_MOD, s->fd, (uint32_t)ev, s); }
}
static void run_relay(int lport, int to, int sp) {
    use_splice = sp;
    int e = epoll_create1(0), l = listen_on(lport);
    ep(e, EPOLL_CTL_ADD, l, EPOLLIN, NULL);
    printf("{\"ready\":1}\n"); fflush(stdout);
    struct epoll_event ev[256];
    rs *grave[1024]; int ng = 0;
    for (;;) {
        int n = epoll_wait(e, ev, 256, -1);
        for (int i = 0; i < n; i++) {
            rs *s = ev[i].data.ptr;
            if (!s) {
                for (int k = 0; k < 64; k++) {
                    int fd = accept4(l, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                    if (fd < 0) break;
                    nodelay(fd);
                    rs *a = calloc(1, sizeof *a), *b = calloc(1, sizeof *b);
                    a->fd = fd; b->fd = dial_start(to); a->peer = b; b->peer = a;
                    if (b->fd < 0) { close(fd); free(a); free(b); continue; }
                    b->connecting = 1;
                    for (rs *x = a;; x = b) { if (use_splice) { if (pipe2(x->pipe, O_NONBLOCK | O_CLOEXEC) < 0) die("pipe"); fcntl(x->pipe[1], F_SETPIPE_SZ, 1 << 18); } else x->b = malloc(RBUF); if (x == b) break; }
                    a->evs = 0; b->evs = EPOLLOUT;
                    ep(e, EPOLL_CTL_ADD, a->fd, 0, a); ep(e, EPOLL_CTL_ADD, b->fd, EPOLLOUT, b);
                }
                continue;
            }
            if (s->dead) continue;
            rs *p = s->peer; int bad = 0;
            if (s->connecting) { int so = 0; socklen_t sl = sizeof so; getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &so, &sl); s->connecting = 0; bad = so; }
            if (!bad && !p->connecting) {
                uint32_t x = ev[i].events;
                bad = (x & EPOLLERR) || ((x & (EPOLLIN | EPOLLHUP)) && move(s) < 0) || ((x & EPOLLOUT) && move(p) < 0);
            } else if (!bad && (ev[i].events & (EPOLLERR | EPOLLHUP))) bad = 1;
            if (bad || (s->eof && p->eof && !held(s) && !held(p))) {
                for (rs *x = s;; x = p) { close(x->fd); if (use_splice) { close(x->pipe[0]); close(x->pipe[1]); } x->dead = 1; if (x == p) break; }
                grave[ng++] = s; grave[ng++] = p;
                continue;
            }
            rearm(e, s); rearm(e, p);
        }
        for (int i = 0; i < ng; i++) { free(grave[i]->b); free(grave[i]); }
        ng = 0;
    }
}

/* ================= a long path ================= */
#define PIECE (64 * 1024)
#define PIECES 2048 /* 128 MiB each way: more than any window */
typedef struct piece { struct piece *next; uint64_t due; size_t off, len; char b[PIECE]; } piece;
typedef struct ds { int fd, evs, dead, connecting, full, eof, shut; struct ds *peer; piece *head, *tail; int count; uint64_t eof_due; struct ds *all; } ds;
static piece *spare_pieces;
static void d_arm(int e, ds *s) { /* s reads into its queue, its peer's queue is written to s */
    piece *p = s->peer->head;
    int out = s->connecting || (p && p->due <= now());
    int ev = (!s->connecting && !s->eof && s->count < PIECES ? EPOLLIN : 0) | (out ? EPOLLOUT : 0);
    if (ev != s->evs) { s->evs = ev; ep(e, EPOLL_CTL_MOD, s->fd, (uint32_t)ev, s); }
}
static int d_read(ds *s, uint64_t delay) {
    for (int i = 0; i < 16 && s->count < PIECES && !s->eof; i++) {
        piece *p = spare_pieces;
        if (p) spare_pieces = p->next; else p = malloc(sizeof *p);
        ssize_t n = recv(s->fd, p->b, PIECE, 0);
        if (n <= 0) {
            p->next = spare_pieces; spare_pieces = p;
            if (n < 0) return errno == EAGAIN ? 0 : -1;
            s->eof = 1; s->eof_due = now() + delay;
            break;
        }
        p->off = 0; p->len = (size_t)n; p->due = now() + delay; p->next = NULL;
        if (s->tail) s->tail->next = p; else s->head = p;
        s->tail = p; s->count++;
    }
    return 0;
}
static int d_write(ds *to) { /* what is due of the other side's queue */
    ds *s = to->peer;
    for (piece *p; (p = s->head) && p->due <= now();) {
        ssize_t n = send(to->fd, p->b + p->off, p->len - p->off, MSG_NOSIGNAL);
        if (n < 0) return errno == EAGAIN ? 0 : -1;
        p->off += (size_t)n;
        if (p->off < p->len) return 0;
        s->head = p->next; if (!s->head) s->tail = NULL;
        p->next = spare_pieces; spare_pieces = p; s->count--;
    }
    if (s->eof && !s->head && !to->shut && s->eof_due <= now()) { shutdown(to->fd, SHUT_WR); to->shut = 1; }
    return 0;
}
static void run_delay(int lport, int to, double ms) {
    uint64_t delay = (uint64_t)(ms * 1e6);
    int e = epoll_create1(0), l = listen_on(lport);
    ep(e, EPOLL_CTL_ADD, l, EPOLLIN, NULL);
    printf("{\"ready\":1}\n"); fflush(stdout);
    struct epoll_event ev[256]; ds *all = NULL;
    for (;;) {
        uint64_t next = now() + 1000000000ull;
        for (ds *s = all; s; s = s->all) {
            if (s->head && s->head->due < next && s->head->due > now()) next = s->head->due;
            if (s->eof && !s->peer->shut && s->eof_due < next) next = s->eof_due;
        }
        uint64_t t = now(), wait = next > t ? next - t : 0;
        struct timespec ts = {(time_t)(wait / 1000000000ull), (long)(wait % 1000000000ull)};
        int n = epoll_pwait2(e, ev, 256, &ts, NULL);
        for (int i = 0; i < n; i++) {
            ds *s = ev[i].data.ptr;
            if (!s) {
                int fd = accept4(l, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (fd < 0) continue;
                nodelay(fd);
                ds *a = calloc(1, sizeof *a), *b = calloc(1, sizeof *b);
                a->fd = fd; b->fd = dial_start(to); a->peer = b; b->peer = a; b->connecting = 1;
                if (b->fd < 0) { close(fd); free(a); free(b); continue; }
                a->all = b; b->all = all; all = a;
                ep(e, EPOLL_CTL_ADD, a->fd, 0, a); ep(e, EPOLL_CTL_ADD, b->fd, 0, b);
                continue;
            }
            if (s->connecting && (ev[i].events & EPOLLOUT)) { int so = 0; socklen_t sl = sizeof so; getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &so, &sl); s->connecting = 0; s->dead |= so != 0; }
            else if (ev[i].events & EPOLLERR) s->dead = 1;
            if (!s->dead && (ev[i].events & (EPOLLIN | EPOLLHUP)) && d_read(s, delay) < 0) s->dead = 1;
        }
        for (ds **at = &all; *at;) { /* pairs lie side by side */
            ds *a = *at, *b = a->all;
            if (!a->connecting && !b->connecting && (d_write(a) < 0 || d_write(b) < 0)) a->dead = 1;
            if (a->dead || b->dead || (a->shut && b->shut)) {
                *at = b->all;
                for (ds *x = a;; x = b) { close(x->fd); for (piece *p; (p = x->head);) { x->head = p->next; free(p); } if (x == b) break; }
                free(a); free(b);
                continue;
            }
            d_arm(e, a); d_arm(e, b);
            at = &b->all;
        }
    }
}

/* ================= machine facts ================= */
static void run_limits(void) {
    size_t big = 64 << 20; char *a = malloc(big), *b = malloc(big);
    memset(a, 1, big); memset(b, 2, big);
    uint64_t t = now(); int r = 0;
    do { memcpy(b, a, big); __asm__ volatile("" ::"r"(b) : "memory"); r++; } while (now() - t < 500000000ull);
    double mc_big = (double)big * r / (double)(now() - t);
    t = now(); uint64_t k = 0;
    do { for (int i = 0; i < 64; i++) { memcpy(b, a, 65536); __asm__ volatile("" ::"r"(b) : "memory"); } k += 64; } while (now() - t < 500000000ull);
    double mc_small = 65536.0 * (double)k / (double)(now() - t);
    t = now(); k = 0;
    do { for (int i = 0; i < 1000; i++) getppid(); k += 1000; } while (now() - t < 300000000ull);
    double sys_ns = (double)(now() - t) / (double)k;
    /* loopback ping-pong of 1 byte and send+recv of 16 KiB on one thread */
    int l = socket(AF_INET, SOCK_STREAM, 0), c = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in ad = {.sin_family = AF_INET}; ad.sin_addr.s_addr = htonl(INADDR_LOOPBACK); socklen_t sl = sizeof ad;
    if (bind(l, (void *)&ad, sizeof ad) || listen(l, 8) || getsockname(l, (void *)&ad, &sl) || connect(c, (void *)&ad, sl)) die("loop");
    int s = accept(l, NULL, NULL); nodelay(c); nodelay(s);
    double per[2]; size_t sz[2] = {128, 16384};
    for (int z = 0; z < 2; z++) {
        t = now(); k = 0;
        do { if (send(c, a, sz[z], 0) < 0) die("send"); for (size_t g = 0; g < sz[z];) { ssize_t n = recv(s, b, sz[z], 0); if (n <= 0) die("recv"); g += (size_t)n; } k++; } while (now() - t < 500000000ull);
        per[z] = (double)(now() - t) / (double)k;
    }
    printf("{\"memcpy_64MiB_GBps\":%.2f,\"memcpy_64KiB_GBps\":%.2f,\"syscall_ns\":%.0f,\"loop_send_recv_128B_ns\":%.0f,\"loop_send_recv_16KiB_ns\":%.0f}\n",
           mc_big, mc_small, sys_ns, per[0], per[1]);
}

int main(int ac, char **av) {
    signal(SIGPIPE, SIG_IGN);
    struct rlimit rl = {200000, 200000};
    if (setrlimit(RLIMIT_NOFILE, &rl)) { getrlimit(RLIMIT_NOFILE, &rl); rl.rlim_cur = rl.rlim_max; setrlimit(RLIMIT_NOFILE, &rl); }
    for (size_t i = 0; i < sizeof pat; i++) pat[i] = MARK[i & 31];
    memcpy(srcbuf, pat, CHUNK);
    h2msg[3] = (H2BODY - 5) >> 8; h2msg[4] = (char)((H2BODY - 5) & 255);
    memcpy(h2msg + 5, pat, H2BODY - 5);
    const char *m = ac > 1 ? av[1] : "";
    if (!strcmp(m, "origin") && ac == 3) origin(atoi(av[2]));
    else if (!strcmp(m, "http") && ac == 7) run_http(atoi(av[2]), atoi(av[3]), atof(av[4]), strtoul(av[5], 0, 10), atof(av[6]));
    else if (!strcmp(m, "churn") && ac == 6) run_churn(atoi(av[2]), atoi(av[3]), atof(av[4]), strtoul(av[5], 0, 10));
    else if (!strcmp(m, "idle") && ac == 4) run_idle(atoi(av[2]), atoi(av[3]));
    else if (!strcmp(m, "bulk") && ac == 6) run_bulk(atoi(av[2]), atoi(av[3]), atof(av[4]), av[5][0]);
    else if (!strcmp(m, "h2") && ac == 6) run_h2(atoi(av[2]), atoi(av[3]), atoi(av[4]), atof(av[5]));
    else if (!strcmp(m, "streams") && ac == 8) run_streams(atoi(av[2]), atoi(av[3]), atoi(av[4]), atof(av[5]), atoi(av[6]), av[7][0]);
    else if (!strcmp(m, "put") && ac == 6) run_put(atoi(av[2]), atoi(av[3]), atof(av[4]), strtoul(av[5], 0, 10));
    else if (!strcmp(m, "delay") && ac == 5) run_delay(atoi(av[2]), atoi(av[3]), atof(av[4]));
    else if (!strcmp(m, "relay") && ac == 5) run_relay(atoi(av[2]), atoi(av[3]), av[4][0] == 's');
    else if (!strcmp(m, "limits")) run_limits();
    else { fprintf(stderr, "see the head of load.c for use\n"); return 2; }
    return 0;
}
