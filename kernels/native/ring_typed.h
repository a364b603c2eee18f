/* The part of ring.c that depends on the type: VALUE, WORD (unsigned, as wide), NAMED, and SCALED: whether it multiplies. */

/* `n` <= 32 numbers with the signs of a word, scaled. */
static inline void NAMED(turn)(const WORD *from, WORD *to, int n, uint32_t word, VALUE factor) {
    WORD bits[32];
    VALUE some[32];
    for (int j = 0; j < n; j++) bits[j] = from[j] ^ (WORD)(word >> j & 1) << (8 * sizeof(WORD) - 1);
    if (SCALED) {
        memcpy(some, bits, n * sizeof(WORD));
        for (int j = 0; j < n; j++) some[j] *= factor;
        memcpy(bits, some, n * sizeof(WORD));
    }
    memcpy(to, bits, n * sizeof(WORD));
}

/* Elements begin .. end-1 of the weight in logical order, with signs and scale: in place too. */
static void NAMED(turned)(const ring_view *v, VALUE factor, int64_t begin, int64_t end, const WORD *from, WORD *to) {
    uint32_t words[STRIP];
    int64_t at = v->first + begin, last = v->first + end;
    from -= at, to -= at; /* to be indexed by places in the whole weight */
    while (at < last) {
        int64_t word0 = at / 32, stop = least(last, 32 * (word0 + STRIP));
        sign_words(v, word0, words);
        for (; at < stop && at % 32; at++) NAMED(turn)(from + at, to + at, 1, words[0] >> at % 32, factor);
        for (; at + 32 <= stop; at += 32) NAMED(turn)(from + at, to + at, 32, words[at / 32 - word0], factor);
        for (; at < stop; at++) NAMED(turn)(from + at, to + at, 1, words[at / 32 - word0] >> at % 32, factor);
    }
}

/* Blocks lie all over the ring: what a strip reads is on its way while the first of it is used. */
static inline void NAMED(expect)(const ring_view *v, const void *ring, int n, const int64_t *cells) {
    for (int i = 0; i < n; i++)
        for (int64_t at = 0; at < v->block * (int64_t)sizeof(WORD); at += 64)
            __builtin_prefetch((const char *)ring + cells[i] * (int64_t)sizeof(WORD) + at);
}

/* Elements begin .. end-1 of the weight in logical order, with signs and scale. */
static void NAMED(read)(
    const ring_view *v, double reciprocal, VALUE factor, const WORD *ring, int64_t begin, int64_t end, WORD *out
) {
    int64_t cells[STRIP], block = v->block, whole = v->first + begin;
    int64_t last = (v->first + end - 1) / block;
    for (int64_t b = whole / block; b <= last; b += STRIP) {
        int n = (int)least(STRIP, last + 1 - b);
        cells_of(v, reciprocal, b, n, cells);
        NAMED(expect)(v, ring, n, cells);
        for (int i = 0; i < n; i++) {
            int64_t from = (b + i) * block, skip = from < whole ? whole - from : 0;
            int64_t count = least(block, v->first + end - from) - skip;
            int64_t cell = cells[i] + skip;
            WORD *target = out + (from + skip - whole);
            if (block == 32 && count == 32 && cell + 32 <= v->size) {
                memcpy(target, ring + cell, 32 * sizeof(WORD));
                continue;
            }
            if (cell >= v->size) cell %= v->size; /* a ring may be shorter than a block */
            for (int64_t j = 0; j < count; j++) {
                target[j] = ring[cell];
                if (++cell == v->size) cell = 0;
            }
        }
    }
    if (v->reflect || SCALED) NAMED(turned)(v, factor, begin, end, out, out);
}

/* One row of a weight from logical order to memory's, or back. */
static inline void NAMED(spread)(const layout *to, const WORD *row, WORD *out) {
    int64_t taps = to->sizes[1], inner = to->sizes[2];
    if (sizeof(WORD) == 4 && to->strides[1] == 1) {
        transposed_32((const uint32_t *)row, taps, inner, inner, (uint32_t *)out, to->strides[2]);
        return;
    }
    for (int64_t i = 0; i < inner; i++)
        for (int64_t k = 0; k < taps; k++) out[k * to->strides[1] + i * to->strides[2]] = row[k * inner + i];
}

static inline void NAMED(collect)(const layout *to, const WORD *in, WORD *row) {
    int64_t taps = to->sizes[1], inner = to->sizes[2];
    if (sizeof(WORD) == 4 && to->strides[1] == 1) {
        transposed_32((const uint32_t *)in, inner, taps, to->strides[2], (uint32_t *)row, inner);
        return;
    }
    for (int64_t i = 0; i < inner; i++)
        for (int64_t k = 0; k < taps; k++) row[k * inner + i] = in[k * to->strides[1] + i * to->strides[2]];
}

/* `scratch`: one row for each thread, of a weight that is not flat. */
void NAMED(ring_weight)(
    const ring_view *v, double scale, int threads, int add, const void *ring, void *weight, void *scratch
) {
    const layout *to = &v->to;
    int64_t count = elements(to), run = run_of(to), runs = runs_of(to);
    double reciprocal = 1.0 / (double)v->size;
    int flat = is_flat(to);
    (void)add; /* a weight is written */
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        WORD *row = (WORD *)scratch + t * run;
        for (int64_t r = runs * t / threads; r < runs * (t + 1) / threads; r++) {
            int64_t begin = r * run, end = least(begin + run, count);
            WORD *out = (WORD *)weight + (flat ? begin : r * to->strides[0]);
            NAMED(read)(v, reciprocal, (VALUE)scale, ring, begin, end, flat ? out : row);
            if (!flat) NAMED(spread)(to, row, out);
        }
    }
}

#if SCALED
/* Adds elements begin .. end-1, ready in `values`, to those of their cells that lie `low` to `high` - 1 after `base`. */
static void NAMED(put)(
    const ring_view *v, double reciprocal, int64_t base, int64_t low, int64_t high, int64_t begin, int64_t end,
    const VALUE *values, VALUE *ring
) {
    int64_t cells[STRIP], block = v->block, size = v->size, whole = v->first + begin;
    int64_t last = (v->first + end - 1) / block;
    values -= whole;
    for (int64_t b = whole / block; b <= last; b += STRIP) {
        int n = (int)least(STRIP, last + 1 - b);
        cells_of(v, reciprocal, b, n, cells);
        if (high - low == size) NAMED(expect)(v, ring, n, cells);
        for (int i = 0; i < n; i++) {
            int64_t from = (b + i) * block, stop = least(from + block, v->first + end), cell = cells[i];
            int64_t away = cell - base + (cell < base ? size : 0);
            if (away + block <= size && (away + block <= low || away >= high)) continue;
            if (block == 32 && from >= whole && stop - from == 32 && cell + 32 <= size && away >= low && away + 32 <= high) {
                for (int j = 0; j < 32; j++) ring[cell + j] += values[from + j];
                continue;
            }
            for (int64_t place = from; place < stop; place++) {
                if (place >= whole && away >= low && away < high) ring[cell] += values[place];
                if (++cell == size) cell = 0;
                if (++away == size) away = 0;
            }
        }
    }
}

/* The gradient of the ring from that of a scaled weight, in `out`, or added to what is there. Where no two elements share a
   cell (`once`), row by row, with a row of `scratch` for each thread. Else `scratch` holds all elements, every thread owns a
   stretch of the ring and passes over all blocks in order: a cell's sum has one order for any number of threads. */
void NAMED(ring_gradient)(
    const ring_view *v, double scale, int threads, int add, const void *gradient, void *out, void *scratch
) {
    const layout *to = &v->to;
    int64_t count = elements(to), run = run_of(to), runs = runs_of(to), size = v->size;
    double reciprocal = 1.0 / (double)size;
    int64_t base = v->arc ? modulo(v->after * v->block, size, reciprocal) : 0;
    int flat = is_flat(to);
    if (!add)
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
        for (int t = 0; t < threads; t++) {
            int64_t low = size * t / threads, high = size * (t + 1) / threads;
            memset((VALUE *)out + low, 0, (size_t)(high - low) * sizeof(VALUE));
        }
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int t = 0; t < threads; t++)
        for (int64_t r = runs * t / threads; r < runs * (t + 1) / threads; r++) {
            int64_t begin = r * run, end = least(begin + run, count);
            VALUE *values = (VALUE *)scratch + (v->once ? t * run : begin);
            const WORD *in = (const WORD *)gradient + (flat ? begin : r * to->strides[0]);
            if (!flat) NAMED(collect)(to, in, (WORD *)values);
            NAMED(turned)(v, (VALUE)scale, begin, end, flat ? in : (WORD *)values, (WORD *)values);
            if (v->once) NAMED(put)(v, reciprocal, base, 0, size, begin, end, values, out);
        }
    if (!v->once)
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
        for (int t = 0; t < threads; t++)
            NAMED(put)(v, reciprocal, 0, size * t / threads, size * (t + 1) / threads, 0, count, scratch, out);
}
#endif

#undef VALUE
#undef WORD
#undef NAMED
#undef SCALED
