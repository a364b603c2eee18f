/* Sums over a basis of random signs on a CPU: fxrpg/basis.py's Rademacher, and the signs of its Khatri-Rao products. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "layout.h"
#include "random.h"

#define CHUNK 2048 /* elements whose sums and words stay in a core's cache while all basis vectors pass by */

typedef struct {
    int64_t first, count; /* elements of the whole weight that are wanted */
    int64_t group;        /* of 32 basis vectors, the first that is wanted */
    uint32_t row[2], column[2];
} basis_view;

static void words_of(const uint32_t *key, int64_t first, int64_t count, uint32_t *words) {
    for (int64_t i = 0; i < count; i++) words[i] = word_at((uint32_t)(first + i), key[0], key[1]);
}

/* All 256 signed sums of eight numbers: bit j of the index turns number j. */
static void sums_of_signs(const double *numbers, double *sums) {
    sums[0] = 0;
    for (int j = 0; j < 8; j++) sums[0] += numbers[j];
    for (int j = 0; j < 8; j++)
        for (int s = 0; s < 1 << j; s++) sums[s + (1 << j)] = sums[s] - 2 * numbers[j];
}

/* sum_k numbers[k] v_ik for every element i, one row of numbers [32 * groups] after another: exact for whole numbers. */
void rademacher_combine(
    const basis_view *v, int64_t rows, int64_t groups, int threads, const double *numbers, double *out
) {
    uint32_t *columns = malloc((size_t)groups * sizeof(uint32_t));
    words_of(v->column, v->group, groups, columns);
    int64_t chunks = (v->count + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t c = 0; c < chunks; c++) {
        uint32_t elements[CHUNK], words[CHUNK];
        double sums[4][256];
        int64_t begin = c * CHUNK, n = least(CHUNK, v->count - begin);
        words_of(v->row, v->first + begin, n, elements);
        for (int64_t r = 0; r < rows; r++) {
            double *total = out + r * v->count + begin;
            memset(total, 0, (size_t)n * sizeof(double));
            for (int64_t g = 0; g < groups; g++) {
                for (int b = 0; b < 4; b++) sums_of_signs(numbers + (r * groups + g) * 32 + 8 * b, sums[b]);
                for (int64_t i = 0; i < n; i++) words[i] = mix32(columns[g] + elements[i]);
                for (int64_t i = 0; i < n; i++) {
                    uint32_t w = words[i];
                    total[i] += sums[0][w & 255] + sums[1][w >> 8 & 255] + sums[2][w >> 16 & 255] + sums[3][w >> 24];
                }
            }
        }
    }
    free(columns);
}

/* The adjoint: sum_i numbers[i] v_ik, rows [32 * groups], from rows [count]. */
void rademacher_project(
    const basis_view *v, int64_t rows, int64_t groups, int threads, const double *numbers, double *out
) {
    uint32_t *columns = malloc((size_t)groups * sizeof(uint32_t));
    uint32_t *elements = malloc((size_t)v->count * sizeof(uint32_t));
    words_of(v->column, v->group, groups, columns);
    words_of(v->row, v->first, v->count, elements);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < groups; g++) {
        uint32_t words[CHUNK];
        double bins[4][256];
        for (int64_t r = 0; r < rows; r++) {
            memset(bins, 0, sizeof bins);
            for (int64_t begin = 0; begin < v->count; begin += CHUNK) {
                int64_t n = least(CHUNK, v->count - begin);
                const double *some = numbers + r * v->count + begin;
                for (int64_t i = 0; i < n; i++) words[i] = mix32(columns[g] + elements[begin + i]);
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
    free(columns);
    free(elements);
}

/* Signs of the basis vectors 32 * group .. of elements whose words are given: out [32 * groups, count], 1 or -1. */
void crossed_signs(
    const uint32_t *key, int64_t group, int64_t groups, int64_t count, int threads, const uint32_t *elements, double *out
) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t g = 0; g < groups; g++) {
        uint32_t words[CHUNK], column = word_at((uint32_t)(group + g), key[0], key[1]);
        for (int64_t begin = 0; begin < count; begin += CHUNK) {
            int64_t n = least(CHUNK, count - begin);
            for (int64_t i = 0; i < n; i++) words[i] = mix32(column + elements[begin + i]);
            for (int j = 0; j < 32; j++)
                for (int64_t i = 0; i < n; i++)
                    out[(32 * g + j) * count + begin + i] = (double)(1 - 2 * (int32_t)(words[i] >> j & 1));
        }
    }
}
