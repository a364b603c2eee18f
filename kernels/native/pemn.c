/* PEMN on a CPU: masks from scores, weights and the gradients of scores, as fxrpg/generators/pemn.py defines them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "layout.h"
#include "random.h"

typedef struct {
    layout to;
    int64_t size;      /* values of the prototype; element i takes value i mod size */
    int64_t normal;    /* near normal values, or signs */
    double deviation;  /* of the integers that near normal values are made of */
    uint32_t key[2];
} pemn_view;

typedef struct {
    int64_t least; /* bits of the least magnitude that is kept */
    int64_t last;  /* the last element of that magnitude that is, in logical order */
    int64_t broken; /* whether a score is not finite */
} selection;

/* The bits of a score's magnitude, which grow with it; all that is not finite is the same. */
static inline uint32_t magnitude(float score) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits &= 0x7FFFFFFFu;
    return bits > 0x7F800000u ? 0x7F800000u : bits;
}

/* Counts, by the `width` bits from `shift` on, of the magnitudes whose higher bits are `above`. */
static void counted(
    const float *scores, int64_t count, int threads, int shift, int width, uint32_t above, int64_t *found
) {
    memset(found, 0, sizeof(int64_t) << width);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t own[2048] = {0};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = magnitude(scores[i]);
            if (bits >> (shift + width) == above) own[bits >> shift & ((1u << width) - 1)]++;
        }
#pragma omp critical
        for (int b = 0; b < 1 << width; b++) found[b] += own[b];
    }
}

/* The `kept` largest magnitudes: a selection by digits, three passes over the scores whatever they are. */
void pemn_select(const layout *to, int64_t kept, int threads, const float *scores, selection *out) {
    int64_t found[2048], count = elements(to), left = kept;
    static const int shifts[3] = {20, 10, 0}, widths[3] = {11, 10, 10};
    uint32_t bits = 0;
    for (int pass = 0; pass < 3; pass++) {
        counted(scores, count, threads, shifts[pass], widths[pass], bits, found);
        int b = (1 << widths[pass]) - 1;
        if (pass == 0) out->broken = found[0x7F800000u >> 20] > 0;
        while (found[b] < left) left -= found[b--];
        bits = bits << widths[pass] | (uint32_t)b;
        if (pass == 2 && found[b] == left) left = 0; /* all of them: no need to know which is the last */
    }
    out->least = bits;
    out->last = count;
    for (int64_t e = 0; left; e++) {
        int64_t i = e % to->sizes[2], k = e / to->sizes[2] % to->sizes[1], a = e / to->sizes[2] / to->sizes[1];
        if (magnitude(scores[a * to->strides[0] + k * to->strides[1] + i * to->strides[2]]) == bits && --left == 0)
            out->last = e;
    }
}

/* Prototype values first .. first+count-1, before any scale. */
static void drawn(const pemn_view *v, int64_t first, int64_t count, double *values) {
    for (int64_t j = 0; j < count; j += STRIP) {
        int32_t totals[STRIP];
        uint32_t at = (uint32_t)(first + j);
        int n = (int)least(STRIP, count - j);
        if (v->normal) {
            for (int i = 0; i < STRIP; i++) {
                totals[i] = -4 * 0xFFFF;
                for (uint32_t t = 0; t < 4; t++) {
                    uint32_t word = word_at(4 * (at + (uint32_t)i) + t, v->key[0], v->key[1]);
                    totals[i] += (int32_t)(word & 0xFFFF) + (int32_t)(word >> 16);
                }
            }
            for (int i = 0; i < n; i++) values[j + i] = (double)totals[i] / v->deviation;
        } else {
            for (int i = 0; i < n; i++) {
                uint32_t word = word_at((at + (uint32_t)i) / 32, v->key[0], v->key[1]);
                values[j + i] = 1 - 2 * (double)(word >> (at + (uint32_t)i) % 32 & 1);
            }
        }
    }
}

/* The fixed values of elements begin .. end-1: of a prototype shorter than the weight, from `table`, where it is whole. */
static void fixed_values(const pemn_view *v, const double *table, int64_t begin, int64_t end, double *values) {
    if (!table) {
        drawn(v, begin, end - begin, values);
        return;
    }
    for (int64_t e = begin, j = begin % v->size; e < end; e++) {
        values[e - begin] = table[j];
        if (++j == v->size) j = 0;
    }
}

/* Draws the prototype into `table` where the weight goes through it more than once; else there is no table. */
static const double *table_of(const pemn_view *v, int64_t count, double *table) {
    if (v->size >= count) return 0;
    drawn(v, 0, v->size, table);
    return table;
}

/* Masks come from scores and what was selected of them or, without scores, from `bits`, one an element. `scratch`: a run for
   each thread, then a prototype that is shorter than the weight. */
#define WEIGHT(NAME, VALUE)                                                                                             \
    void NAME(                                                                                                          \
        const pemn_view *v, double scale, int threads, const float *scores, const selection *kept, const uint8_t *bits, \
        VALUE *weight, double *scratch                                                                                  \
    ) {                                                                                                                 \
        const layout *to = &v->to;                                                                                      \
        int64_t count = elements(to), run = run_of(to), runs = runs_of(to);                                             \
        int flat = is_flat(to);                                                                                         \
        VALUE factor = (VALUE)scale, rest = (VALUE)(scores && kept->broken ? NAN : 0.0);                                \
        const double *table = table_of(v, count, scratch + threads * run);                                              \
        _Pragma("omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)")                           \
        for (int t = 0; t < threads; t++) {                                                                             \
            double *values = scratch + t * run;                                                                         \
            for (int64_t r = runs * t / threads; r < runs * (t + 1) / threads; r++) {                                   \
                int64_t begin = r * run, end = least(begin + run, count), i = 0, k = 0;                                 \
                fixed_values(v, table, begin, end, values);                                                             \
                for (int64_t e = begin; e < end; e++) {                                                                 \
                    int64_t at = flat ? e : r * to->strides[0] + k * to->strides[1] + i * to->strides[2];               \
                    uint32_t size = scores ? magnitude(scores[at]) : 0;                                                 \
                    int keep = scores ? size > kept->least || (size == kept->least && e <= kept->last)                  \
                                      : bits[e >> 3] >> (e & 7) & 1;                                                    \
                    weight[at] = keep ? (VALUE)values[e - begin] * factor : rest;                                       \
                    if (++i == to->sizes[2]) i = 0, k++;                                                                \
                }                                                                                                       \
            }                                                                                                           \
        }                                                                                                               \
    }

WEIGHT(pemn_weight_32, float)
WEIGHT(pemn_weight_64, double)

/* Straight through the mask: the weight's gradient times its fixed value and the sign of its score. */
void pemn_gradient(
    const pemn_view *v, double scale, int threads, const float *scores, const float *gradient, float *out, double *scratch
) {
    const layout *to = &v->to;
    int64_t count = elements(to), run = run_of(to), runs = runs_of(to);
    int flat = is_flat(to);
    float factor = (float)scale;
    const double *table = table_of(v, count, scratch + threads * run);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        double *values = scratch + t * run;
        for (int64_t r = runs * t / threads; r < runs * (t + 1) / threads; r++) {
            int64_t begin = r * run, end = least(begin + run, count), i = 0, k = 0;
            fixed_values(v, table, begin, end, values);
            for (int64_t e = begin; e < end; e++) {
                int64_t at = flat ? e : r * to->strides[0] + k * to->strides[1] + i * to->strides[2];
                float sign = (float)((scores[at] > 0) - (scores[at] < 0));
                out[at] = gradient[at] * factor * (float)values[e - begin] * sign;
                if (++i == to->sizes[2]) i = 0, k++;
            }
        }
    }
}
