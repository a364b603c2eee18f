/* Sums over a basis of random signs on a CPU: fxrpg/basis.py's Rademacher, and its Khatri-Rao signs of rank one. */

#include <stdint.h>
#include <string.h>

#include "layout.h"
#include "random.h"

#define CHUNK 2048 /* elements whose sums and words stay in a core's cache while all basis vectors pass by */

typedef struct {
    int64_t first, count; /* elements of the whole weight that are wanted */
    int64_t group;        /* of 32 basis vectors, the first that is wanted */
    int64_t inner;        /* over 0: signs are products of an output's and an input's, and so many are an output's */
    int64_t inputs;       /* where the inputs' random words begin, after those of all outputs */
    uint32_t row[2], column[2];
} basis_view;

static void words_of(const uint32_t *key, int64_t first, int64_t count, uint32_t *words) {
    for (int64_t i = 0; i < count; i++) words[i] = word_at((uint32_t)(first + i), key[0], key[1]);
}

/* The random words that belong to a weight's elements begin .. begin+n-1, or to all inputs where signs are products. */
static void element_words(const basis_view *v, int64_t begin, int64_t n, uint32_t *elements) {
    words_of(v->row, v->inner ? v->inputs : v->first + begin, v->inner ? v->inner : n, elements);
}

/* The words of 32 signs each, of one group of basis vectors, for elements begin .. begin+n-1 of the weight. */
static inline void crossed(
    const basis_view *v, uint32_t column, const uint32_t *elements, int64_t begin, int64_t n, uint32_t *words
) {
    if (!v->inner) {
        for (int64_t i = 0; i < n; i++) words[i] = mix32(column + elements[i]);
        return;
    }
    for (int64_t i = 0; i < n;) { /* a row after another: a product of signs is an exclusive or */
        int64_t place = v->first + begin + i, from = place % v->inner, count = least(v->inner - from, n - i);
        uint32_t output = mix32(column + word_at((uint32_t)(place / v->inner), v->row[0], v->row[1]));
        for (int64_t j = 0; j < count; j++) words[i + j] = output ^ mix32(column + elements[from + j]);
        i += count;
    }
}

/* All 256 signed sums of eight numbers: bit j of the index turns number j. */
static void sums_of_signs(const double *numbers, double *sums) {
    sums[0] = 0;
    for (int j = 0; j < 8; j++) sums[0] += numbers[j];
    for (int j = 0; j < 8; j++)
        for (int s = 0; s < 1 << j; s++) sums[s + (1 << j)] = sums[s] - 2 * numbers[j];
}

/* sum_k numbers[k] v_ik for every element i, one row of numbers [32 * groups] after another: exact for whole numbers.
   `scratch`: a word for each group, and for each input where signs are products. */
void signs_combine(
    const basis_view *v, int64_t rows, int64_t groups, int threads, const double *numbers, double *out, uint32_t *scratch
) {
    uint32_t *columns = scratch, *inputs = v->inner ? scratch + groups : 0;
    words_of(v->column, v->group, groups, columns);
    if (inputs) element_words(v, 0, 0, inputs);
    int64_t chunks = (v->count + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t c = 0; c < chunks; c++) {
        uint32_t elements[CHUNK], words[CHUNK];
        double sums[4][256];
        int64_t begin = c * CHUNK, n = least(CHUNK, v->count - begin);
        if (!inputs) element_words(v, begin, n, elements);
        for (int64_t r = 0; r < rows; r++) {
            double *total = out + r * v->count + begin;
            memset(total, 0, (size_t)n * sizeof(double));
            for (int64_t g = 0; g < groups; g++) {
                for (int b = 0; b < 4; b++) sums_of_signs(numbers + (r * groups + g) * 32 + 8 * b, sums[b]);
                crossed(v, columns[g], inputs ? inputs : elements, begin, n, words);
                for (int64_t i = 0; i < n; i++) {
                    uint32_t w = words[i];
                    total[i] += sums[0][w & 255] + sums[1][w >> 8 & 255] + sums[2][w >> 16 & 255] + sums[3][w >> 24];
                }
            }
        }
    }
}

/* The adjoint: sum_i numbers[i] v_ik, rows [32 * groups], from rows [count]. `scratch`: a word for each group, and for each
   element or, where signs are products, each input. */
void signs_project(
    const basis_view *v, int64_t rows, int64_t groups, int threads, const double *numbers, double *out, uint32_t *scratch
) {
    uint32_t *columns = scratch, *elements = scratch + groups;
    words_of(v->column, v->group, groups, columns);
    element_words(v, 0, v->count, elements);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < groups; g++) {
        uint32_t words[CHUNK];
        double bins[4][256];
        for (int64_t r = 0; r < rows; r++) {
            memset(bins, 0, sizeof bins);
            for (int64_t begin = 0; begin < v->count; begin += CHUNK) {
                int64_t n = least(CHUNK, v->count - begin);
                const double *some = numbers + r * v->count + begin;
                crossed(v, columns[g], v->inner ? elements : elements + begin, begin, n, words);
                for (int64_t i = 0; i < n; i++) {
                    uint32_t w = words[i];
                    bins[0][w & 255] += some[i];
                    bins[1][w >> 8 & 255] += some[i];
                    bins[2][w >> 16 & 255] += some[i];
                    bins[3][w >> 24] += some[i];
                }
            }
            for (int b = 0; b < 4; b++)
                for (int j = 7; j >= 0; j--) { /* by halves, the highest bit that is left first */
                    double sum = 0;
                    for (int s = 0; s < 1 << j; s++) {
                        sum += bins[b][s] - bins[b][s + (1 << j)];
                        bins[b][s] += bins[b][s + (1 << j)];
                    }
                    out[(r * groups + g) * 32 + 8 * b + j] = sum;
                }
        }
    }
}
