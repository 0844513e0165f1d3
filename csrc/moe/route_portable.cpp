#include "moe/route_kernel.h"

namespace fastgpt::moe {

const RouteLoops kRouteLoopsPortable = kLoops;

}  // namespace fastgpt::moe
