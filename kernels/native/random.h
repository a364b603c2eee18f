/* The integer random functions of fxrpg/hashing.py, word for word: the golden vectors of the tests hold for both. */

#ifndef FXRPG_RANDOM_H
#define FXRPG_RANDOM_H

#include <stdint.h>

#define STRIP 64 /* blocks or words whose random numbers are made together: a few vectors of any width */

static inline uint32_t mix32(uint32_t h) {
    h = (h ^ h >> 16) * 0x7FEB352Du;
    h = (h ^ h >> 15) * 0x846CA68Bu;
    return h ^ h >> 16;
}

/* Word `index` < 2^32 of the stream with these keys. */
static inline uint32_t word_at(uint32_t index, uint32_t outer, uint32_t inner) {
    return mix32(mix32(index ^ outer) + inner);
}

/* A keyed permutation of 0 .. count-1: `Bijection`. With `rounds` 0, the identity. */
typedef struct {
    int64_t count;
    uint32_t a, b;
    int64_t rounds;
    uint32_t keys[8];
    const int64_t *holes;
} bijection;

static inline uint32_t scaled_square(uint32_t x, uint32_t key, uint32_t n) {
    uint32_t t = x * 0x9E3779B1u + key;
    return (uint64_t)(t * (t | 1)) * n >> 32;
}

static inline uint32_t wrapped(uint32_t sum, uint32_t n) {
    return sum >= n ? sum - n : sum;
}

/* Images of first, first + 1, ... (`n` <= STRIP of them): round by round, so that every round runs in vectors. */
static inline void permuted(const bijection *pi, int64_t first, int n, int64_t *images) {
    uint32_t left[STRIP], right[STRIP];
    if (!pi->rounds) {
        for (int i = 0; i < n; i++) images[i] = first + i;
        return;
    }
    uint32_t l = (uint32_t)(first / pi->b), r = (uint32_t)(first % pi->b);
    for (int i = 0; i < STRIP; i++) { /* past the end of the range too: of what is made there nothing is read */
        left[i] = l;
        right[i] = r;
        if (++r == pi->b) r = 0, l++;
    }
    for (int round = 0; round < pi->rounds; round++) {
        uint32_t key = pi->keys[round];
        if (round % 2 == 0)
            for (int i = 0; i < STRIP; i++) left[i] = wrapped(left[i] + scaled_square(right[i], key, pi->a), pi->a);
        else
            for (int i = 0; i < STRIP; i++) right[i] = wrapped(right[i] + scaled_square(left[i], key, pi->b), pi->b);
    }
    for (int i = 0; i < n; i++) {
        int64_t image = (int64_t)left[i] * pi->b + right[i];
        images[i] = image < pi->count ? image : pi->holes[image - pi->count];
    }
}

#endif
