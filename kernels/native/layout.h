/* Where the elements of a weight, counted in logical order, lie in memory. */

#ifndef FXRPG_LAYOUT_H
#define FXRPG_LAYOUT_H

#include <stdint.h>

/* Logical element (a, k, i) lies at a * strides[0] + k * strides[1] + i * strides[2]. */
typedef struct {
    int64_t sizes[3], strides[3];
} layout;

static inline int64_t elements(const layout *to) {
    return to->sizes[0] * to->sizes[1] * to->sizes[2];
}

static inline int is_flat(const layout *to) {
    return to->sizes[0] == 1 && to->sizes[1] == 1 && to->strides[2] == 1;
}

/* Elements that are made together: of a flat weight what a core's cache holds, else one row of it. */
static inline int64_t run_of(const layout *to) {
    return is_flat(to) ? 8192 : to->sizes[1] * to->sizes[2];
}

static inline int64_t runs_of(const layout *to) {
    return is_flat(to) ? (to->sizes[2] + 8191) / 8192 : to->sizes[0];
}

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

#endif
