/* Small matrices turned over in a core's cache: taps and channels of a convolution's row. */

#ifndef FXRPG_TRANSPOSE_H
#define FXRPG_TRANSPOSE_H

#include <stdint.h>

#ifdef __AVX2__
#include <immintrin.h>

/* to[j, k] = from[k, j] for 8 x 8 words of 32 bits, in rows so many words apart. */
static inline void transposed_8(const uint32_t *from, int64_t from_step, uint32_t *to, int64_t to_step) {
    __m256 r[8], s[8];
    for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_ps((const float *)(from + k * from_step));
    for (int k = 0; k < 8; k += 2) {
        s[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
        s[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
    }
    for (int k = 0; k < 8; k += 4)
        for (int h = 0; h < 2; h++) {
            r[k + 2 * h] = _mm256_shuffle_ps(s[k + h], s[k + 2 + h], 0x44);
            r[k + 2 * h + 1] = _mm256_shuffle_ps(s[k + h], s[k + 2 + h], 0xEE);
        }
    for (int j = 0; j < 4; j++) {
        _mm256_storeu_ps((float *)(to + j * to_step), _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
        _mm256_storeu_ps((float *)(to + (j + 4) * to_step), _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
    }
}
#else
static inline void transposed_8(const uint32_t *from, int64_t from_step, uint32_t *to, int64_t to_step) {
    for (int j = 0; j < 8; j++)
        for (int k = 0; k < 8; k++) to[j * to_step + k] = from[k * from_step + j];
}
#endif

/* to[j, k] = from[k, j] for `rows` x `columns` words of 32 bits. */
static inline void transposed_32(
    const uint32_t *from, int64_t rows, int64_t columns, int64_t from_step, uint32_t *to, int64_t to_step
) {
    int64_t r = rows / 8 * 8, c = columns / 8 * 8;
    for (int64_t j = 0; j < c; j += 8)
        for (int64_t k = 0; k < r; k += 8)
            transposed_8(from + k * from_step + j, from_step, to + j * to_step + k, to_step);
    for (int64_t j = 0; j < columns; j++)
        for (int64_t k = j < c ? r : 0; k < rows; k++) to[j * to_step + k] = from[k * from_step + j];
}

#endif
